"""LLaMA-Factory's own command line, unmodified, under `memfit run`: LoRA, freeze, full, and its own checkpointing."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import pytest

import tiny
from memfit import stacks
from runs import Runs, assert_planned, assert_same_training, report, tail

STEPS = 4
SHARED = {
    "stage": "sft",
    "do_train": True,
    "dataset": "docs",
    "template": "default",
    "cutoff_len": 128,
    "preprocessing_num_workers": 1,
    "logging_steps": 1,
    "save_steps": STEPS,
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.1, "lora_target": "all"}
METHODS = {
    "lora": LORA,
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "full": {"finetuning_type": "full"},
}
DEFAULT = "`disable_gradient_checkpointing: false` (LLaMA-Factory's default) was taken over: the plan decides"
SWITCHES = {
    "reentrant, the default": ({}, (DEFAULT, "`use_reentrant_gc: true` was taken over: blocks do not run again")),
    "not reentrant": (
        {"use_reentrant_gc": False},
        (DEFAULT, "`use_reentrant_gc: false` was taken over: blocks do not run again"),
    ),
    "offloading": (
        {"use_unsloth_gc": True},
        (DEFAULT, "`use_unsloth_gc: true` was taken over: nothing is copied to the host"),
    ),
    "none": (
        {"disable_gradient_checkpointing": True},
        ("`disable_gradient_checkpointing: true` was taken over: what the budget needs is recomputed",),
    ),
    "the Trainer's": (
        {"gradient_checkpointing": True},
        (DEFAULT, "`use_reentrant_gc: true` was taken over"),
    ),
}


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """A folder with a tiny Llama that has dropout, and data as LLaMA-Factory reads them."""
    folder = tmp_path_factory.mktemp("given")
    tiny.decoder(folder / "model", "Llama", "ForCausalLM", attention_dropout=0.1)
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 64}
    tiny.decoder(folder / "wide", "Llama", "ForCausalLM", **wide)
    texts = [text.split() for text in tiny.texts() if len(text.split()) >= 20][:48]
    rows = [{"instruction": " ".join(words[:8]), "input": "", "output": " ".join(words[8:])} for words in texts]
    pairs = [{**row, "chosen": row["output"], "rejected": row["output"][::-1]} for row in rows]
    sets = {"docs": {"file_name": "docs.json"}}
    sets["pairs"] = {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    }
    for name, content in (("docs", rows), ("pairs", pairs), ("dataset_info", sets)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def train(runs, given, name, *, memfit=None, environment=None, **options):
    """Run `llamafactory.cli train`; checkpoints go to the folder ``name`` in that of the runs."""
    places = {"model_name_or_path": str(given / "model"), "dataset_dir": str(given), "output_dir": name}
    file = runs.folder / f"{name}.yaml"
    # JSON scalars are YAML, except that YAML wants a point in 1e-05.
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in {**SHARED, **places, **options}.items()))
    command = ["-m", "llamafactory.cli", "train", file.name]
    if memfit is not None:
        command = ["-m", "memfit", "run", *memfit, "--", *command]
    return runs.python(*command, **(environment or {}))


@pytest.fixture(scope="session")
def plain(given, tmp_path_factory):
    """The folder of a training without Memfit, with LLaMA-Factory's own checkpointing, done once."""

    @functools.cache
    def trained(method):
        runs = Runs(tmp_path_factory.mktemp("plain"))
        done = train(runs, given, "plain", **METHODS[method])
        assert done.status == 0, tail(done.output)
        assert "Gradient checkpointing enabled." in done.output
        return runs.folder / "plain"

    return trained


def assert_trains_as(runs, given, expected, **options):
    """The numbers of ``expected``, under a plan. Returns the notes of the report."""
    done = train(runs, given, "fitted", memfit=["--budget", "min", "--report", "report.json"], **options)
    assert done.status == 0, tail(done.output)
    assert_same_training(runs.folder / "fitted", expected)
    summary = report(runs.folder / "report.json")
    assert_planned(summary, steps=STEPS)
    return summary["notes"]


def assert_notes(notes, *expected):
    """Each line once, and no other that speaks of a switch."""
    about = [note for note in notes if "taken over" in note]
    assert len(about) == len(expected), notes
    for line in expected:
        assert any(note.startswith(line) for note in about), notes


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_as_without_memfit(runs, given, plain, method):
    """To the last digit, with a plan in place of the checkpointing that is on by default."""
    notes = assert_trains_as(runs, given, plain(method), **METHODS[method])
    assert_notes(notes, *SWITCHES["reentrant, the default"][1])


@pytest.mark.parametrize("switch", [name for name in SWITCHES if name != "reentrant, the default"])
def test_a_switch_is_taken_over(runs, given, plain, switch):
    """One line of explanation each. None of them changes a digit."""
    options, lines = SWITCHES[switch]
    assert_notes(assert_trains_as(runs, given, plain("lora"), **LORA, **options), *lines)


def test_the_offloading_that_drops_random_numbers_never_runs(runs, given):
    """Alone it fails on CPU, as its backward asks for a GPU by name; under Memfit nothing of it is called."""
    done = train(runs, given, "plain", **LORA, use_unsloth_gc=True)
    assert done.status != 0
    assert 'hidden_states.to("cuda"' in done.output
    assert "in _cuda_init" in done.output or "in _lazy_init" in done.output
    fitted = train(
        runs, given, "fitted", memfit=["--policy", "full", "--report", "r.json"], **LORA, use_unsloth_gc=True
    )
    assert fitted.status == 0, tail(fitted.output)


def test_without_a_budget_its_switch_decides(runs, given, plain):
    """LLaMA-Factory checkpoints by default: then blocks recompute all they can, and its numbers are the same."""
    done = train(runs, given, "fitted", memfit=["--report", "report.json"], **LORA)
    assert done.status == 0, tail(done.output)
    assert_same_training(runs.folder / "fitted", plain("lora"))
    summary = report(runs.folder / "report.json")
    assert_planned(summary, steps=STEPS)
    default = "`disable_gradient_checkpointing: false` (LLaMA-Factory's default) was taken over: blocks recompute all"
    assert_notes(summary["notes"], default, "`use_reentrant_gc: true` was taken over")


OTHERS = {
    "autocast, accumulated": {"bf16": True, "gradient_accumulation_steps": 2},
    "preferences": {"stage": "dpo", "dataset": "pairs", "pref_beta": 0.1},
    "DoRA, a trained head": {"use_dora": True, "additional_target": "lm_head"},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_options(runs, given, options):
    done = train(runs, given, "plain", **{**LORA, **options})
    assert done.status == 0, tail(done.output)
    assert_trains_as(runs, given, runs.folder / "plain", **{**LORA, **options})


def test_the_budget_is_kept(runs, given):
    """Where activations dominate, resident memory peaks as low as is asked for."""
    wide = {"model_name_or_path": str(given / "wide"), "packing": True, "cutoff_len": 256, **LORA}
    wide |= {"per_device_train_batch_size": 8, "disable_gradient_checkpointing": True}
    plain = train(runs, given, "plain", **wide)
    assert plain.status == 0, tail(plain.output)
    budget = int(0.8 * plain.peak_bytes)
    # The same allocator, nothing recomputed: what a budget alone changes.
    measured = train(runs, given, "measured", memfit=[], **wide)
    fitted = train(runs, given, "fitted", memfit=["--budget", budget, "--report", "report.json"], **wide)
    assert fitted.status == 0, tail(fitted.output)
    assert_same_training(runs.folder / "fitted", runs.folder / "plain")
    assert_planned(report(runs.folder / "report.json"), steps=STEPS)
    # Two percent: what the process holds changes a little from run to run, whatever Memfit does.
    assert fitted.peak_bytes <= 1.02 * budget
    assert fitted.peak_bytes < 0.9 * measured.peak_bytes


def test_its_own_torchrun_runs_under_memfit(runs, given):
    """With several devices the command line starts `torchrun`: each of its processes has a plan, and a report."""
    ranks = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    ranks["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = train(runs, given, "plain", environment=ranks, **LORA)
    assert done.status == 0, tail(done.output)
    options = ["--budget", "min", "--report", "report.json"]
    fitted = train(runs, given, "fitted", memfit=options, environment=ranks, **LORA)
    assert fitted.status == 0, tail(fitted.output)
    assert_same_training(runs.folder / "fitted", runs.folder / "plain")
    for name in ("report.json", "report.rank1.json"):
        summary = report(runs.folder / name)
        assert_planned(summary, steps=STEPS)
        assert_notes(summary["notes"], *SWITCHES["reentrant, the default"][1])


def test_a_failure_of_its_torchrun_is_the_status(runs, given):
    """What fails there fails here."""
    done = train(
        runs,
        given,
        "fitted",
        memfit=["--budget", "min"],
        environment={"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"},
        **LORA,
        dataset="absent",
    )
    assert done.status == 1
    assert "nothing was fitted" not in done.output


def test_the_example_runs_as_it_stands(runs):
    examples = Path(__file__).parents[2] / "examples"
    made = runs.python(examples / "llamafactory_tiny.py")
    assert made.status == 0, tail(made.output)
    options = ["--budget", "min", "--report", "report.json"]
    done = runs.memfit(options, "-m", "llamafactory.cli", "train", examples / "llamafactory.yaml")
    assert done.status == 0, tail(done.output)
    assert_planned(report(runs.folder / "report.json"), steps=5)


def test_the_lines_that_a_plan_prints_are_its_arguments(tmp_path):
    """`memfit plan --for llamafactory`: read as its command line reads YAML, beside arguments that train."""
    hparams = pytest.importorskip("llamafactory.hparams")
    yaml = pytest.importorskip("yaml")
    needed = {"model_name_or_path": "x", "stage": "sft", "do_train": True, "output_dir": str(tmp_path), "use_cpu": True}
    for setting in stacks.find("llamafactory").settings:
        lines = yaml.safe_load("\n".join(setting.paste()))
        model, *_ = hparams.get_train_args({**needed, "dataset": "docs", "template": "default", **lines})
        assert model.disable_gradient_checkpointing is (setting.kind == "nothing")
        assert model.use_unsloth_gc is (setting.kind == "offload")
        assert model.use_reentrant_gc is (setting.kind != "full")
