"""FlagEmbedding's own entry points, unmodified, under `memfit run`: six families, one process and two.

The seventh, whose model FlagEmbedding brings along, needs an older transformers: `test_flagembedding_layerwise.py`.
"""

from __future__ import annotations

import functools
import shlex
import sys
from pathlib import Path

import pytest

import tiny
from flagembedding_families import CHECKPOINTING, FAMILIES, STEPS, assert_trains_as_plain, layerwise_minicpm, train
from memfit import stacks
from runs import Runs, assert_planned, assert_same_training, report, tail

LAYERWISE = "reranker-decoder-layerwise"
HERE = [name for name in FAMILIES if name != LAYERWISE]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Tiny models of the kinds that the families are used with, and their data."""
    folder = tmp_path_factory.mktemp("models")
    tiny.pairs(folder / "pairs.jsonl", scores=True, prompt="Find the sentence that continues this one.")
    tiny.encoder(folder / "bert")
    tiny.encoder(folder / "bert-wide", hidden_size=128, intermediate_size=512, num_hidden_layers=6)
    tiny.encoder(folder / "bert-classifier", head="ForSequenceClassification", num_labels=1)
    tiny.encoder(folder / "xlm-roberta", "XLMRoberta")
    tiny.decoder(folder / "mistral")
    tiny.decoder(folder / "gemma", "Gemma", "ForCausalLM")
    layerwise_minicpm(folder / "minicpm")
    return folder


@pytest.fixture(scope="session")
def plain(models, tmp_path_factory):
    """The folder of a family's training without Memfit and without checkpointing, done once."""

    @functools.cache
    def trained(name, num_ranks):
        runs = Runs(tmp_path_factory.mktemp("plain"))
        done = train(runs, FAMILIES[name], models, "trained", num_ranks=num_ranks)
        assert done.status == 0, tail(done.output)
        return runs.folder / "trained"

    return trained


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", HERE)
def test_a_family_trains_as_without_memfit(runs, models, plain, name, num_ranks):
    """To the last digit, with a plan in place of the checkpointing that the command line asks for."""
    assert_trains_as_plain(runs, FAMILIES[name], models, plain(name, num_ranks), num_ranks=num_ranks)


def test_nothing_is_marked_as_ready_twice(runs, models, plain):
    """What DDP says to reentrant checkpointing, and does not under Memfit."""
    family = FAMILIES["embedder-encoder-base"]
    reentrant = [*CHECKPOINTING, "--gradient_checkpointing_kwargs", '{"use_reentrant": true}']
    failed = train(runs, family, models, "failed", *reentrant, num_ranks=2)
    assert failed.status != 0
    assert "marked as ready twice" in failed.output
    fitted = train(runs, family, models, "fitted", *reentrant, memfit=["--budget", "min"], num_ranks=2)
    assert fitted.status == 0, tail(fitted.output)
    assert "taken over by the plan" in fitted.output
    assert_same_training(runs.folder / "fitted", plain("embedder-encoder-base", 2))


OTHER_OPTIONS = {
    "autocast, accumulated, Matryoshka": (
        "embedder-encoder-base",
        "--bf16 True --gradient_accumulation_steps 2 --use_mrl True --mrl_dims 8 16 32",
    ),
    "frozen encoder": ("embedder-encoder-m3", "--fix_encoder True"),
    "no LoRA": ("embedder-decoder-base", "--use_lora False"),
    "adapter and head": ("reranker-decoder-base", "--modules_to_save lm_head"),
}


@pytest.mark.parametrize(("name", "options"), OTHER_OPTIONS.values(), ids=OTHER_OPTIONS)
def test_other_options(runs, models, name, options):
    family = FAMILIES[name]
    expected = train(runs, family, models, "expected", *options.split())
    assert expected.status == 0, tail(expected.output)
    assert_trains_as_plain(runs, family, models, runs.folder / "expected", *options.split())


def test_the_budget_is_kept(runs, models):
    """Where activations dominate: no checkpointing is asked for, and resident memory peaks as low as is asked for."""
    family = FAMILIES["embedder-encoder-base"]
    wide = ["--train_group_size", 8, "--per_device_train_batch_size", 8, "--passage_max_len", 128]
    wide += ["--sub_batch_size", -1, "--pad_to_multiple_of", 128, "--model_name_or_path", models / "bert-wide"]
    plain = train(runs, family, models, "plain", *wide)
    assert plain.status == 0, tail(plain.output)
    budget = int(0.6 * plain.peak_bytes)
    # The same allocator, nothing recomputed: what a budget alone changes.
    measured = train(runs, family, models, "measured", *wide, memfit=[])
    fitted = train(runs, family, models, "fitted", *wide, memfit=["--budget", budget, "--report", "report.json"])
    assert fitted.status == 0, tail(fitted.output)
    assert_same_training(runs.folder / "fitted", runs.folder / "plain")
    summary = report(runs.folder / "report.json")
    assert_planned(summary, steps=STEPS)
    assert not any("taken over" in note for note in summary["notes"])
    # Two percent: what the process holds changes a little from run to run, whatever Memfit does.
    assert fitted.peak_bytes <= 1.02 * budget
    assert fitted.peak_bytes < 0.8 * measured.peak_bytes


def test_a_budget_that_nothing_fits_ends_the_run(runs, models):
    """With the status for it, and the smallest budget that would do; no traceback."""
    done = train(runs, FAMILIES["embedder-encoder-base"], models, "fitted", memfit=["--budget", "300MiB"])
    assert done.status == 3
    assert "memfit: No plan fits 300 MiB: the smallest peak is " in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_example_runs_as_it_stands(runs, num_ranks):
    example = Path(__file__).parents[2] / "examples" / "embedder_flagembedding.sh"
    settings = {"PYTHON": sys.executable, "WORK": str(runs.folder), "RANKS": str(num_ranks)}
    done = runs.command(example, "--use_cpu", True, "--disable_tqdm", True, **settings)
    assert done.status == 0, tail(done.output)
    assert_planned(report(runs.folder / "report.json"), steps=5)


def test_the_layerwise_reranker_needs_an_older_transformers(runs, models):
    """Its model reads a field of the configuration that transformers 5 has renamed: Memfit has no part in it."""
    done = train(runs, FAMILIES[LAYERWISE], models, "plain")
    assert done.status == 1
    assert "KeyError: 'type'" in done.output


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("task", ["embedder", "reranker"])
def test_the_lines_that_a_plan_prints_are_its_arguments(models, tmp_path, task):
    """`memfit plan --for flagembedding`: read by the dataclasses of its entry points, and handed to the model."""
    from FlagEmbedding.abc.finetune import embedder, reranker
    from transformers import AutoModel, AutoTokenizer, HfArgumentParser

    data, training = {
        "embedder": (embedder.AbsEmbedderDataArguments, embedder.AbsEmbedderTrainingArguments),
        "reranker": (reranker.AbsRerankerDataArguments, reranker.AbsRerankerTrainingArguments),
    }[task]
    parser = HfArgumentParser((data, training))
    stack = stacks.find("flagembedding")
    step = stacks.Situation(task=task, num_devices=2, lora=False, draws=True)
    beside = [remark.text for remark in stack.beside if remark.holds(step)]
    for setting in stack.settings:
        words = [word for line in (*setting.paste(2), *beside) for word in shlex.split(line)]
        needed = ["--train_data", str(models / "pairs.jsonl"), "--output_dir", str(tmp_path), "--use_cpu", "True"]
        given, arguments = parser.parse_args_into_dataclasses([*needed, *words])
        assert given.pad_to_multiple_of == 8
        assert arguments.gradient_checkpointing is (setting.kind != "nothing")
        assert task != "embedder" or arguments.negatives_cross_device
        if setting.kind == "every_n" and task == "embedder":
            from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel

            inner = AutoModel.from_pretrained(models / "bert-wide")
            wrapper = BiEncoderOnlyEmbedderModel(inner, tokenizer=AutoTokenizer.from_pretrained(models / "bert-wide"))
            wrapper.gradient_checkpointing_enable(**arguments.gradient_checkpointing_kwargs)  # as the Trainer does
            flags = [layer.gradient_checkpointing for layer in inner.encoder.layer]
            assert flags == [True, False] * 3
