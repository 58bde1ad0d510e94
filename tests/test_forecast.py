"""`memfit plan`, `frontier` and `max` of models that are not there, as a shell sees them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from memfit import configurations, hardware
from memfit.cli import largest, main
from memfit.cli.largest import largest as search
from memfit.forecast import Forecast
from memfit.predictions import PARTS
from memfit.report.forecast import render_frontier
from memfit.simulation.device import CUDA_CONTEXT_BYTES
from memfit.solver.planner import switched

SIZES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return str(tmp_path)


STEP = ["--batch", "2", "--seq", "128"]


def test_the_answer_comes_first(folder, capsys):
    assert main(["plan", folder, *STEP, "--gpu", "rtx4090", "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fits       LlamaForCausalLM on rtx4090: at most ")
    assert lines[1].startswith("peak ")
    text = "\n".join(lines)
    for switch in ("nothing", "full checkpointing", "selective checkpointing", "layer", "memfit"):
        assert f"\n{switch}" in text or switch == "layer"
    assert "TFLOPs recomputed" in text
    assert lines[-1].startswith("not counted: ")


def test_json_has_the_same(folder, capsys):
    assert main(["plan", folder, *STEP, "--gpu", "rtx4090", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    peak = found["peak_bytes"]
    assert peak["low"] <= peak["expected"] <= peak["high"] <= found["budget_bytes"]
    assert sum(peak["parts"].values()) == peak["expected"]
    assert {"name", "peak_bytes", "step_seconds", "fits"} == set(found["alternatives"][0])
    assert set(peak["parts"]) == set(PARTS)
    assert found["alternatives"][0]["name"] == "nothing"
    assert found["plan"]["calls"]
    assert found["tokens_per_second"] == pytest.approx(2 * 128 / found["step_seconds"])
    assert found["not_counted"]
    assert found["compute_factor"] > 2.5


def test_switches_fit_where_their_highest_peak_does(folder):
    """As the plan does: within the budget by what is expected alone is not enough."""
    forecast = Forecast(configurations.load(folder), device="rtx4090", batch_size=64, precision="bf16")
    peaks = {every: forecast.of(switched(forecast.profile, every_n_layers=every)).peak for every in (2, 3, 4)}
    assert peaks[2] == peaks[3]
    assert peaks[3].high < peaks[4].expected
    for budget, name, fits in (
        (peaks[4].high, "every 4th layer", True),
        (peaks[4].high - 1, "every 3rd layer", True),
        (peaks[4].expected, "every 3rd layer", True),
        (peaks[2].high - 1, "every 2nd layer", False),
    ):
        rows = {row.name: row for row in forecast.within(budget).alternatives}
        assert rows[name].fits is fits
        assert [each for each in rows if each.startswith("every")] == [name]
        full = forecast.of(switched(forecast.profile, policy="full")).peak
        assert rows["full checkpointing"].fits is (full.high <= budget)


def test_what_would_fit_is_said_where_the_plan_does_not(folder, capsys):
    words = ["plan", folder, *STEP, "--gpu", "rtx4090"]
    highest = []
    for more in ([], ["--chunked-loss"]):
        assert main([*words, *more, "--budget", "min", "--json"]) == 0
        highest.append(json.loads(capsys.readouterr().out)["peak_bytes"]["high"])
    assert highest[1] < highest[0]
    assert main([*words, "--budget", str(highest[1])]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("too large ")
    assert lines[1].startswith("fits with  memfit, chunked loss: ")
    assert main([*words, "--budget", str(highest[1] - 1)]) == 3
    assert "fits with" not in capsys.readouterr().out


def test_several_devices_count_for_tokens_only(folder, capsys):
    found = []
    for gpus in ("h100", "8xh100"):
        main(["plan", folder, *STEP, "--gpus", gpus, "--json"])
        found.append(json.loads(capsys.readouterr().out))
    assert found[1]["tokens_per_second"] == pytest.approx(8 * found[0]["tokens_per_second"])
    assert found[1]["peak_bytes"] == found[0]["peak_bytes"]


def test_what_does_not_fit_is_status_3_and_shows_the_smallest(folder, capsys):
    assert main(["plan", folder, *STEP, "--gpu", "rtx4090", "--budget", "60MiB"]) == 3
    assert capsys.readouterr().out.startswith("too large ")


def test_a_plan_file_for_the_real_model(folder, tmp_path, capsys):
    """Made from the configuration alone; applied to the model with weights."""
    import transformers

    import memfit

    path = tmp_path / "plan.json"
    words = ["plan", folder, *STEP, "--dtype", "fp32", "--budget", "min", "-o", str(path)]
    assert main(words) == 0
    capsys.readouterr()
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    handle = memfit.apply(model, memfit.Plan.load(path))
    ids = torch.randint(0, 512, (2, 128))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    summary = handle.summary()
    assert summary["recomputed_bytes"] == memfit.Plan.load(path).recomputed_bytes > 0
    assert not any("does not know" in note for note in summary["notes"])


def test_a_function_for_another_device(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def loss(output, batch):\n    return (output - batch).square().mean()\n\n"
        "def build():\n"
        "    layers = [nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)]\n"
        "    return nn.Sequential(*layers), torch.randn(64, 32), loss\n"
    )
    assert main(["plan", "build.py:build", "--gpu", "l4"]) == 0
    assert "Sequential on l4" in capsys.readouterr().out


def test_frontier(folder, capsys):
    words = ["frontier", folder, *STEP, "--gpu", "rtx4090", "--points", "4"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    peaks = [each["peak_bytes"]["expected"] for each in found]
    seconds = [each["step_seconds"] for each in found]
    assert peaks == sorted(peaks)
    assert seconds == sorted(seconds, reverse=True)
    assert found[-1]["plan"]["recomputed_bytes"] == 0
    assert all(each["fits"] for each in found)
    assert main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_the_frontier_says_what_the_device_has_no_room_for(folder):
    entry = hardware.find("rtx4090")
    config, sizes = configurations.load(folder), {"batch_size": 64, "length": 512}
    peaks = [each.peak.high for each in Forecast(config, device=entry, **sizes).frontier(5)]
    assert peaks == sorted(set(peaks))
    ratios = [after / before for before, after in pairwise(peaks)]
    assert max(ratios) < 1.5 * min(ratios)
    small = replace(entry, memory_bytes=CUDA_CONTEXT_BYTES + peaks[2])
    found = Forecast(config, device=small, **sizes).frontier(5)
    assert [each.fits for each in found] == [True, True, True, False, False]
    assert {each.budget_bytes for each in found} == {peaks[2]}
    rows = render_frontier(found).splitlines()
    assert [row.endswith("does not fit") for row in rows] == [False] * 5 + [True] * 2


@pytest.mark.parametrize("limit", [1, 2, 7, 64])
def test_the_search_is_as_good_as_trying_every_number(limit):
    for best in range(limit + 3):
        tried = []

        def fits(number, best=best, tried=tried):
            tried.append(number)
            return number <= best

        assert search(fits, limit) == min(best, limit)
        assert len(tried) == len(set(tried)) <= 14


@pytest.mark.parametrize("way", ["batch", "seq"])
def test_max_is_what_trying_every_one_gives(folder, capsys, way, monkeypatch):
    monkeypatch.setattr(largest, "MAX_BATCH", 12)

    def plan(number, budget):
        step = [number, 64] if way == "batch" else [2, 64 * number]
        words = ["--batch", str(step[0]), "--seq", str(step[1]), "--gpu", "rtx4090", "--budget", budget, "--json"]
        status = main(["plan", folder, *words])
        return status, json.loads(capsys.readouterr().out)["peak_bytes"]["high"]

    budget = str(plan(5, "min")[1] + 1000)
    expected = max(number for number in range(1, 9) if plan(number, budget)[0] == 0)
    assert 5 <= expected < 8
    given = ["--seq", "64"] if way == "batch" else ["--batch", "2"]
    assert main(["max", folder, *given, "--gpu", "rtx4090", "--budget", budget, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"] if way == "batch" else found["seq"] // 64) == expected
    assert found["fits"]


def test_max_where_nothing_fits(folder, capsys):
    assert main(["max", folder, "--seq", "64", "--gpu", "rtx4090", "--budget", "72MiB"]) == 3
    assert "not even a batch of 1 fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "llama-3-9b"], "Nearest: `llama-3-8b`"),
        (["plan", "FOLDER", "--gpu", "rtx4091"], "Nearest: `rtx4090`"),
        (["plan", "FOLDER", "--batch", "0"], "`--batch 0` is below 1"),
        (["plan", "FOLDER", "--seq", "1024"], "beyond the 512 positions"),
        (["plan", "FOLDER", "--lora", "4", "--lora-targets", "nothing"], "LoRA found nothing to adapt"),
        (["plan", "FOLDER", "--lora-dropout", "1"], "no probability below 1"),
        (["plan", "FOLDER", "--optimizer", "adamx"], "no optimizer `adamx`"),
        (["plan", "FOLDER", "--budget", "much"], "much"),
        (["plan", "FOLDER", "--policy", "full"], "shows every switch"),
        (["plan", "FOLDER", "-o", "nowhere/plan.json"], "There is no folder"),
        (["plan", "FOLDER", "--lora-targets", "q_proj"], "give their rank with `--lora`"),
        (["plan", "FOLDER", "--freeze", ","], "`--freeze` names nothing"),
        (["plan", "FOLDER", "--attention", "bogus"], "no attention `bogus`"),
        (["plan", "FOLDER", "--attention", "flash_attention_3"], "no attention `flash_attention_3`"),
        (["plan", "FOLDER", "--batch", "999999999999"], "more than any device holds"),
        (["plan", "build.py:build", "--lora", "4"], "build it into what `build.py:build` returns"),
        (["max", "FOLDER", "--seq", "64", "--budget", "min"], "its own smallest peak"),
        (["max", "vit-base", "--batch", "2"], "An image has no tokens"),
        (["plan", "whisper-small", "--seq", "500"], "beyond the 448 positions"),
        (["plan", "vit-base", "--task", "embedder"], "ViTModel reads `pixel_values`"),
        (["plan", "whisper-small", "--seq", "64", "--task", "embedder"], "WhisperEncoder reads `input_features`"),
        (["plan", "roberta-base", "--seq", "513"], "beyond the 512 positions"),
        (["frontier", "FOLDER", "--points", "1"], "not between 2 and 100"),
        (["max", "FOLDER"], "Give `--seq N`"),
        (["max", "FOLDER", "--seq", "64", "--batch", "2"], "Give `--seq N`"),
    ],
)
def test_errors(folder, capsys, words, message):
    assert main([folder if word == "FOLDER" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_answer_is_all_that_is_printed(shell):
    """What libraries have to say of GPT-2, its loss and its layers, is not."""
    done = shell.memfit("plan", "gpt2", "--lora", "4", "--seq", "32", "--gpu", "l4")
    assert done.returncode == 0
    assert done.stdout.startswith("fits ")
    assert done.stderr == ""


def test_a_configuration_with_remote_code(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "auto_map": {"AutoModelForCausalLM": "m.Model"}}))
    assert main(["plan", str(tmp_path), *STEP]) != 0
    assert "code" in capsys.readouterr().err


def test_a_function_that_raises_shows_its_own_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def build():\n    raise RuntimeError('no data')\n")
    with pytest.raises(RuntimeError, match="no data"):
        main(["plan", "broken.py:build", "--gpu", "l4"])
