"""The switches of training stacks: the best that each has by itself, and that what is printed is what it has."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from memfit import stacks
from memfit.cli import main
from memfit.errors import UnknownNameError
from memfit.forecast import Forecast
from memfit.solver.planner import switched
from memfit.solver.special import attention_policy, full_policy
from memfit.stacks import Remark, Situation
from programs import llama_block

SIZES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
STEP = ["--batch", "4", "--seq", "1024", "--gpu", "rtx4090"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(SIZES))
    return str(path)


@pytest.fixture(scope="module")
def forecast(folder):
    return Forecast(folder, device="rtx4090", batch_size=4, length=1024, precision="bf16")


@pytest.fixture(scope="module")
def drawing(folder):
    """With dropout in its blocks."""
    options = {"precision": "bf16", "lora": 4, "lora_dropout": 0.1}
    return Forecast(folder, device="rtx4090", batch_size=4, length=1024, **options)


def high(forecast, plan):
    return forecast.of(plan).peak.high


# The table


@pytest.mark.parametrize("stack", stacks.STACKS.values(), ids=lambda stack: stack.name)
def test_an_entry_is_whole(stack):
    kinds = [setting.kind for setting in stack.settings]
    assert kinds[0] == "nothing"
    assert "full" in kinds
    assert len(set(kinds)) == len(kinds)
    for setting in stack.settings:
        assert any("{n}" in line for line in setting.lines) == (setting.kind == "every_n")
        assert not any("{n}" in line for line in setting.paste(3))
        if setting.drops_random_state:
            assert any(remark.draws for remark in setting.warnings), "a wrong switch says so"
    for remark in (*stack.warnings, *(r for setting in stack.settings for r in setting.warnings)):
        assert remark.text.endswith("."), remark.text


@pytest.mark.parametrize("path", sorted(Path(stacks.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_an_entry_says_where_it_was_read(path):
    text = path.read_text(encoding="utf-8")
    assert ("Stack(" in text and "Source:\n" in text) or path.stem in ("__init__", "catalog", "entry")


def test_names():
    assert stacks.find("DeepSpeed-Chat").name == "deepspeed-chat"
    with pytest.raises(UnknownNameError, match=r"`llamafactory`"):
        stacks.find("llama-factry")


@pytest.mark.parametrize(
    ("remark", "holds"),
    [
        (Remark(text="a"), True),
        (Remark(text="a", tasks=("embedder",)), False),
        (Remark(text="a", tasks=("causal-lm", "embedder")), True),
        (Remark(text="a", lora=True), False),
        (Remark(text="a", draws=True), True),
        (Remark(text="a", several=True), False),
    ],
)
def test_a_remark_knows_when_it_holds(remark, holds):
    assert remark.holds(Situation(task="causal-lm", num_devices=1, lora=False, draws=True)) is holds


# What is printed is what the stack has


def words_of(stack):
    """The arguments of each setting, as a shell splits them."""
    for setting in stack.settings:
        beside = [remark.text for remark in stack.beside]
        yield setting, [word for line in (*setting.paste(3), *beside) for word in shlex.split(line)]


@pytest.mark.parametrize("name", ["transformers", "fsdp"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_trainer_takes_the_lines(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    parser = transformers.HfArgumentParser(transformers.TrainingArguments)
    for setting, words in words_of(stacks.find(name)):
        if words[0] == "accelerate":
            words = words[words.index("--gradient_checkpointing") :]
        (arguments,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *words])
        own = name == "transformers" and setting.kind != "nothing"
        assert bool(arguments.gradient_checkpointing) is own
        kwargs = arguments.gradient_checkpointing_kwargs or {}
        assert kwargs.get("every_n_layers") == (3 if setting.kind == "every_n" else None)
        assert kwargs.get("offload") == (True if own and setting.kind == "offload" else None)
        if name == "fsdp" and setting.kind != "offload":
            assert arguments.fsdp_config["activation_checkpointing"] is (setting.kind == "full")


def test_accelerate_takes_the_line_that_begins_with_it():
    launch = pytest.importorskip("accelerate.commands.launch")
    (line,) = [line for s in stacks.find("fsdp").settings for line in s.lines if line.startswith("accelerate")]
    words = shlex.split(line)[2:]
    try:
        arguments = launch.launch_command_parser().parse_args([*words, "train.py"])
    except SystemExit:
        pytest.skip("this accelerate is older than the flag")
    assert arguments.use_fsdp
    assert (arguments.fsdp_activation_checkpointing, arguments.fsdp_activation_checkpointing_offload) == (
        "true",
        "true",
    )


def test_every_nth_layer_is_the_same_layers_as_transformers(folder, forecast):
    """Which layers the Trainer's switch flags, and which the priced plan recomputes."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(every_n_layers=4)
    flagged = {name for name, module in model.model.layers.named_children() if module.gradient_checkpointing}
    plan = switched(forecast.profile, every_n_layers=4)
    full = {key: full_policy(program) for key, program in forecast.profile.programs.items()}
    assert {c.name.rpartition(".")[2] for i, c in enumerate(plan.calls) if plan.policy(i) == full[c.program]} == flagged
    assert flagged == {"0", "4"}


def test_saved_attention():
    """Beside what full checkpointing keeps, the output of attention and nothing else."""
    block = llama_block()
    (attention,) = [op for op in block.ops if "scaled_dot_product" in op.name]
    more = set(attention_policy(block).kept) - set(full_policy(block).kept)
    assert more == set(attention.outputs)


# The best setting


def test_the_best_number_is_the_fastest_that_fits(forecast):
    """Against all numbers, one after the other, at a budget between them."""
    plans = {number: switched(forecast.profile, every_n_layers=number) for number in range(2, 7)}
    budget = high(forecast, plans[3])
    prediction = forecast.within(budget, stacks.find("transformers"))
    fitting = [number for number, plan in plans.items() if high(forecast, plan) <= budget]
    best = min(fitting, key=lambda number: forecast.of(plans[number]).step_seconds)
    found = prediction.stack
    assert found.fits
    assert found.setting == f"every {best}{ {2: 'nd', 3: 'rd'}.get(best, 'th') } layer"
    assert f'{{"every_n_layers": {best}}}' in found.lines[1]
    expected = forecast.of(plans[best])
    assert (found.peak_bytes, found.step_seconds) == (expected.peak.expected, expected.step_seconds)
    assert found.gain.step_ratio == pytest.approx(expected.step_seconds / prediction.step_seconds)
    assert found.gain.step_ratio > 1
    assert found.gain.peak_bytes == expected.peak.expected - prediction.peak.expected


def test_a_stack_is_offered_what_it_has(forecast):
    """At the same budget: LLaMA-Factory has no every n-th layer, DeepSpeed-Chat no offloading."""
    budget = high(forecast, switched(forecast.profile, every_n_layers=3))
    assert forecast.within(budget, stacks.find("llamafactory")).stack.setting == "full checkpointing"
    smallest = forecast.within("min", stacks.find("deepspeed-chat")).stack
    assert (smallest.setting, smallest.lines) == ("full checkpointing", ("--gradient_checkpointing",))
    assert not smallest.fits
    assert forecast.within("1TiB", stacks.find("unsloth")).stack.lines == ("use_gradient_checkpointing=False",)
    assert forecast.within(budget, stacks.find("trl")).stack.lines[0] == "--gradient_checkpointing True"


def test_what_drops_the_random_state_is_taken_last(forecast, drawing):
    """Without dropout it is as good as others; with dropout only where nothing else fits, and with a warning."""
    for each in (forecast, drawing):
        moved = each.within("1TiB", stacks.find("unsloth"))
        full = high(each, switched(each.profile, policy="full"))
        assert moved.fits
        offload = each.within(full - 4 * 1024 * 64 * 2, stacks.find("llamafactory")).stack
        assert offload.lines[1] == "use_unsloth_gc: true"
        assert offload.fits
        assert any("random state" in sentence for sentence in offload.warnings) is (each is drawing)
        assert each.within(full, stacks.find("llamafactory")).stack.setting == "full checkpointing"


def test_lines_beside_and_warnings_depend_on_the_step(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "num_hidden_layers": 2}))
    found = {}
    for count in (1, 8):
        made = Forecast(
            str(tmp_path), device="rtx4090", task="embedder", batch_size=2, length=64, num_devices=count, group=2
        )
        found[count] = made.within(stack=stacks.find("flagembedding")).stack
    assert "--pad_to_multiple_of 8" in found[1].lines
    assert not any("cross_device" in line for line in found[1].lines)
    assert "--negatives_cross_device True" in found[8].lines
    assert any("number of devices" in sentence for sentence in found[8].warnings)


# The command line


def test_the_lines_stand_under_the_table(folder, capsys):
    assert main(["plan", folder, *STEP, "--for", "llamafactory"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("for llamafactory"))
    assert "nothing is recomputed" in lines[start]
    assert lines[start + 2] == "    disable_gradient_checkpointing: true"
    assert lines[start + 3].startswith("  memfit: 1.00 times as fast")


def test_json_carries_it(folder, capsys):
    assert main(["plan", folder, *STEP, "--for", "TRL", "--json"]) == 0
    stack = json.loads(capsys.readouterr().out)["stack"]
    assert stack["name"] == "trl"
    assert stack["lines"] == ["--gradient_checkpointing False"]
    assert set(stack["gain"]) == {"step_ratio", "peak_bytes"}
    assert {"peak_bytes", "step_seconds", "warnings", "fits", "setting"} <= set(stack)
    assert main(["plan", folder, *STEP, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stack"] is None


def test_bad_input(folder, tmp_path, monkeypatch, capsys):
    assert main(["plan", folder, *STEP, "--for", "transformer"]) == 2
    assert "Nearest: `transformers`" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build.py").write_text("def build():\n    raise AssertionError\n")
    assert main(["plan", "build.py:build", "--for", "trl"]) == 2
    assert "`--gpu`" in capsys.readouterr().err
