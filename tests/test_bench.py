"""`memfit bench`: its cells, what it refuses, and real steps against what was predicted for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import memfit
from memfit import configurations, host
from memfit.blocks import find_blocks
from memfit.cells import Cell, Measured
from memfit.cli import main
from memfit.errors import UsageError
from memfit.predictions import Peak
from memfit.report.bench import render_cells
from memfit.simulation import tasks

MIB = 2**20
MEASURED = Measured(
    peak_bytes=1000 * MIB,
    unheld_peak_bytes=1100 * MIB,
    tensor_bytes=600 * MIB,
    step_seconds=0.5,
    unheld_step_seconds=0.4,
    beside_bytes=400 * MIB,
    allocator="tcmalloc",
    held=True,
    peak_of_step=True,
)
CELL = Cell(
    model="gpt2",
    batch=2,
    length=64,
    trains="lora",
    plan="full",
    peak=Peak(low=900 * MIB, expected=950 * MIB, high=1000 * MIB, event="loss", parts={}),
    tensor_bytes=597 * MIB,
    step_seconds=0.25,
    measured=MEASURED,
)


def test_a_step_above_the_highest_is_under_predicted():
    assert CELL.holds
    assert CELL.peak_ratio == 0.95
    assert CELL.tensor_ratio == 0.995
    assert CELL.time_ratio == 0.5
    above = replace(CELL, measured=replace(MEASURED, peak_bytes=1000 * MIB + 1))
    assert above.under_predicted
    assert not above.holds
    assert not replace(CELL, measured=None, reason="killed", failed=True).holds
    assert replace(CELL, measured=None, reason="needs more than is free").holds


def test_the_table_says_what_does_not_hold():
    above = replace(CELL, plan="plain", measured=replace(MEASURED, peak_bytes=1001 * MIB))
    skipped = replace(CELL, trains="full", measured=None, reason="needs 9 GiB")
    text = render_cells([CELL, above, skipped])
    assert text.startswith("1 of 2 measured steps took at most the highest that was predicted, of 3 cells\n")
    assert "does not hold: batch 2 × 64, lora, plain" in text
    assert "does not hold: batch 2 × 64, lora, full" not in text
    assert "tensors: predicted is 0.995 to 0.995 of measured" in text
    assert "needs 9 GiB" in text


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-0.6b", "t5-small", "whisper-small", "gemma-2-2b", "gpt2"])
def test_fewer_layers(name):
    """A model is built with them: what the configuration lists by layer is cut, too."""
    config = configurations.load(name)
    cut = configurations.with_layers(config, 2)
    with torch.device("meta"):
        kind = transformers.AutoModelForSeq2SeqLM if name == "t5-small" else transformers.AutoModel
        model = kind.from_config(cut)
    assert len(find_blocks(model)) == (4 if config.is_encoder_decoder else 2)
    assert cut.get_text_config().num_hidden_layers == 2
    assert config.to_dict() == configurations.load(name).to_dict()


@pytest.mark.parametrize("count", [0, 33])
def test_more_layers_than_there_are(count):
    with pytest.raises(UsageError, match=f"`layers={count}`: this llama has 32"):
        configurations.with_layers(configurations.load("llama-3-8b"), count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8000,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
    }
    place = tmp_path_factory.mktemp("model")
    (place / "config.json").write_text(json.dumps(sizes))
    return str(place)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train", "half"], "`--train` does not know `half`"),
        (["--train", ","], "`--train` names nothing"),
        (["--plans", "best"], "`--plans` does not know `best`"),
        (["--batch", "1,0"], "`--batch 0` is below 1"),
        (["--layers", "7"], "this llama has 6"),
        (["--optimizer", "adamw-8bit"], "only torch's optimizers are run"),
        (["--gpu", "m4-max"], "only on `cpu` and `cuda`"),
        (["-o", "nowhere/cells.json"], "There is no folder"),
    ],
)
def test_errors(folder, capsys, words, message):
    assert main(["bench", folder, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(folder, capsys):
    assert main(["bench", folder, "--gpu", "rtx4090"]) == 2
    assert "torch finds none here" in capsys.readouterr().err


def test_what_is_too_large_is_not_tried(folder, capsys, monkeypatch):
    monkeypatch.setattr(host, "free_bytes", lambda: 64 * MIB)
    words = ["bench", folder, "--layers", "2", "--seq", "64", "--train", "full", "--plans", "plain", "--json"]
    assert main(words) == 1
    captured = capsys.readouterr()
    (cell,) = json.loads(captured.out)["cells"]
    assert cell["measured"] is None
    assert "64.0 MiB are free" in cell["reason"]
    assert "no cell could be measured" in captured.err


def test_batches_of_real_tensors():
    """Of the geometry of those that predictions are made with."""
    for name, task in (("bert-base-uncased", "embedder"), ("bert-base-uncased", "reranker"), ("vit-base", "image")):
        config = configurations.with_layers(configurations.load(name), 1)
        config.hidden_size, config.intermediate_size, config.num_attention_heads = 32, 32, 2
        job = tasks.build(config, task=task, batch_size=2, length=8, device=torch.device("cpu"))
        value = job.loss()
        value.backward()
        assert value.isfinite()
        assert all(p.grad is not None for n, p in job.model.named_parameters() if "pooler" not in n)


def test_a_step_that_fails_is_named(folder, capsys, monkeypatch):
    monkeypatch.setattr(host, "find_allocator", lambda: None)
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # Python itself does not start
    words = ["bench", folder, "--layers", "2", "--seq", "64", "--train", "full", "--plans", "plain"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "does not hold: batch 1 × 64, full, plain: The measured step ended with status 1" in captured.out


def test_an_allocator_that_takes_no_limit_has_more_slack(folder, monkeypatch):
    """Of a prediction for CPU; one for a GPU is the same."""
    config = configurations.with_layers(configurations.load(folder), 2)
    found = {}
    for word in ("", "system"):
        monkeypatch.setenv("MEMFIT_ALLOCATOR", word)
        for device in ("cpu", "l4"):
            peak = memfit.simulate(config, length=64, device=device, budget="min").peak
            found[word, device] = (peak.expected - sum(peak.parts.values()) + peak.parts["allocator_slack"], peak.low)
    if host.allocator() == "tcmalloc" or host.find_allocator() is not None:
        assert found["system", "cpu"][0] > 5 * found["", "cpu"][0]
    assert found["system", "l4"] == found["", "l4"]


def test_the_committed_cells():
    """Four architectures on CPU: the resident set within 8% of what is expected, tensors within 1%."""
    files = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("bench-cpu-*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    cells = [cell for each in found for cell in each["cells"]]
    assert len({cell["model"] for cell in cells}) == 4
    assert len(cells) >= 24
    for cell in cells:
        predicted, measured = cell["predicted"], cell["measured"]
        assert measured["peak_bytes"] <= predicted["peak_bytes"]["high"]
        assert sum(predicted["peak_bytes"]["parts"].values()) == predicted["peak_bytes"]["expected"]
        assert predicted["peak_bytes"]["parts"]["allocator_slack"] > 0
        assert predicted["peak_bytes"]["expected"] == pytest.approx(measured["peak_bytes"], rel=0.08)
        assert predicted["tensor_bytes"] == pytest.approx(measured["tensor_bytes"], rel=0.01)


def test_the_committed_cells_under_glibc():
    """The resident set within 15% of what is expected, and never above the highest; tensors within 1%."""
    files = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("bench-glibc-*.json"))
    cells = [cell for file in files for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]
    assert len({(cell["model"], cell["trains"], cell["plan"]) for cell in cells}) >= 6
    for cell in cells:
        predicted, measured = cell["predicted"], cell["measured"]
        assert measured["allocator"] == "glibc"
        assert measured["held"]
        assert measured["peak_bytes"] <= predicted["peak_bytes"]["high"]
        assert measured["peak_bytes"] == pytest.approx(predicted["peak_bytes"]["expected"], rel=0.15)
        assert sum(predicted["peak_bytes"]["parts"].values()) == predicted["peak_bytes"]["expected"]
        assert predicted["peak_bytes"]["parts"]["allocator_slack"] > 0
        assert predicted["tensor_bytes"] == pytest.approx(measured["tensor_bytes"], rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(host.find_allocator() is None, reason="there is no tcmalloc")
def test_real_steps(folder, tmp_path):
    """Counted in tensors within 1%; the resident set within 8% of what is expected, and never above the highest."""
    path = tmp_path / "cells.json"
    words = ["bench", folder, "--batch", "8", "--seq", "256", "--dtype", "fp32", "--train", "lora"]
    assert main([*words, "--plans", "plain,full", "-o", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["holds"]
    assert len(found["cells"]) == 2
    for cell in found["cells"]:
        assert cell["measured"]["held"]
        assert cell["measured"]["peak_of_step"]
        assert cell["measured"]["peak_bytes"] <= cell["predicted"]["peak_bytes"]["high"]
        assert cell["ratios"]["tensors"] == pytest.approx(1, rel=0.01)
        assert cell["ratios"]["peak"] == pytest.approx(1, rel=0.08)
    assert found["origin"]["versions"]["torch"] == torch.__version__


@pytest.mark.slow
@pytest.mark.skipif(host.allocator() != "glibc", reason="malloc is not glibc's")
def test_a_step_is_held_where_the_allocator_takes_no_limit(folder, tmp_path, monkeypatch):
    """By the plan that saves everything, where nothing else minds a budget."""
    monkeypatch.setenv("MEMFIT_ALLOCATOR", "system")
    path = tmp_path / "cells.json"
    words = ["bench", folder, "--batch", "4", "--seq", "64", "--dtype", "fp32", "--train", "full", "--plans", "plain"]
    main([*words, "-o", str(path)])
    (cell,) = json.loads(path.read_text())["cells"]
    assert cell["measured"]["held"]
    assert cell["measured"]["allocator"] == "glibc"
    assert cell["ratios"]["tensors"] == pytest.approx(1, rel=0.01)
