"""Gradient caching before a run: the peak of a real step in sub-batches, its FLOPs, and which sub-batches fit."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import transformers
from torch.nn import functional as F

import memfit
from live import settled_peak
from memfit.cli import main
from memfit.contrastive import cached_embeddings, info_nce
from memfit.errors import UsageError
from memfit.forecast import Forecast
from memfit.simulation.cached import MAX_REHEARSALS, largest_that_fits
from memfit.solver.planner import switched

QUERIES, GROUP, LENGTH, VOCABULARY = 4, 4, 96, 500
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}
EMBEDDER = {"task": "embedder", "batch_size": QUERIES, "length": LENGTH, "group": GROUP}


def config():
    return transformers.BertConfig(**SIZES)


def batches():
    generator = torch.Generator().manual_seed(1)
    found = []
    for rows in (QUERIES, QUERIES * GROUP):
        mask = torch.ones(rows, LENGTH, dtype=torch.long)
        mask[:, -5:] = 0  # a prediction takes rows for padded
        found.append(
            {"input_ids": torch.randint(5, VOCABULARY, (rows, LENGTH), generator=generator), "attention_mask": mask}
        )
    return found


def measured(plan, rows):
    """The most bytes that tensors held in a real step in sub-batches under a plan."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    handle = memfit.fit(model, plan=plan, optimizer=optimizer) if plan is not None else None
    given = batches()

    def encode(**batch):
        return F.normalize(model(**batch).last_hidden_state[:, 0], dim=-1)

    def step():
        queries, passages = cached_embeddings(encode, *given, rows=rows)
        info_nce(queries, passages).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = settled_peak(step, model, optimizer, given)
    if handle is not None:
        assert {block["mode"] for block in handle.summary()["blocks"]} == {"replay"}
        assert (handle.summary()["recomputed_bytes"] > 0) == (plan.recomputed_bytes > 0)
        handle.remove()
    return found


@pytest.mark.parametrize(("rows", "policy"), [(2, "full"), (8, "plain"), (8, "full")])
def test_the_peak_is_that_of_a_real_step(rows, policy):
    """Counted in live tensors; never over what is promised."""
    forecast = Forecast(config(), **EMBEDDER, precision="fp32", cache_rows=rows)
    plan = switched(forecast.profile, policy=policy, **forecast.named)
    actual = measured(plan if policy != "plain" else None, rows)
    assert plan.predicted_peak_bytes == pytest.approx(actual, rel=0.035)
    prediction = forecast.of(plan)
    assert actual <= prediction.peak.high - prediction.peak.parts["process"]
    assert sum(prediction.peak.parts.values()) == prediction.peak.expected
    assert min(prediction.peak.parts.values()) >= 0


def test_the_loss_may_own_the_peak():
    """Of many rows with little work each: their scores are never split."""
    small = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    forecast = Forecast(small, task="embedder", batch_size=512, length=4, group=4, precision="fp32", cache_rows=8)
    prediction = forecast.within("min")
    assert prediction.peak.event == "loss"
    scores = 512 * 2048 * 4
    assert scores < prediction.peak.parts["loss"] < 5 * scores
    assert sum(prediction.peak.parts.values()) == prediction.peak.expected


def test_a_step_has_one_more_forward():
    """Counted in FLOPs, the loss's own few aside: the same for every size of the sub-batches."""
    whole = memfit.simulate(config(), **EMBEDDER, precision="fp32")
    for rows in (1, 4, 16):
        found = memfit.simulate(config(), **EMBEDDER, precision="fp32", cache_rows=rows)
        assert found.forward_flops == pytest.approx(whole.forward_flops, rel=1e-6)
        assert found.backward_flops == pytest.approx(whole.backward_flops, rel=1e-6)
        assert found.recomputed_flops == pytest.approx(whole.forward_flops, rel=1e-5)
        assert found.compute_factor == pytest.approx(whole.compute_factor + 1, rel=1e-5)
        assert found.tokens_per_second == pytest.approx(
            whole.tokens_per_second * whole.step_seconds / found.step_seconds
        )
        assert found.step_seconds > whole.step_seconds


def test_recomputation_counts_for_every_sub_batch():
    forecast = Forecast(config(), **EMBEDDER, precision="fp32", cache_rows=4)
    plain, full = (forecast.of(switched(forecast.profile, policy=policy)) for policy in ("plain", "full"))
    sub_batches = (QUERIES + QUERIES * GROUP) / 4
    assert full.step_seconds - plain.step_seconds == pytest.approx(sub_batches * full.plan.recompute_seconds)
    assert full.compute_factor == pytest.approx(plain.compute_factor + 1, abs=0.1)


def test_accumulation_keeps_gradients_through_the_loss():
    found = []
    for accumulate in (1, 2):
        forecast = Forecast(config(), **EMBEDDER, precision="fp32", cache_rows=4, accumulate=accumulate)
        (event,) = [event for event in forecast.profile.events if event.name == "loss"]
        found.append(event.outside_bytes)
    parameters = sum(p.numel() for p in transformers.AutoModel.from_config(config()).parameters())
    pooler = SIZES["hidden_size"] * (SIZES["hidden_size"] + 1)
    assert found[1] - found[0] == 4 * (parameters - pooler)


def offered(prediction):
    return [each for each in prediction.alternatives if "gradient caching" in each.name]


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_sub_batch_that_fits_is_offered(share):
    """The largest that recomputes nothing, or a faster one; what it is said to take, it takes."""
    forecast = Forecast(config(), **EMBEDDER, precision="fp32", device="l4")
    low = Forecast(config(), **EMBEDDER, precision="fp32", device="l4", cache_rows=1).within("min").peak.high
    high = forecast.within("24GiB").peak.high
    budget = int(low + share * (high - low))
    prediction = forecast.within(budget)
    (row,) = offered(prediction)
    alone = {
        rows: memfit.simulate(config(), **EMBEDDER, precision="fp32", device="l4", cache_rows=rows, budget=budget)
        for rows in (1, 2, 4, 8)
    }
    plain = max(n for n, each in alone.items() if each.fits and not each.plan.recomputed_bytes)
    rows = int(row.name.removeprefix("memfit, gradient caching (sub-batches of ").removesuffix(")"))
    assert rows in (plain, 2 * plain)
    assert alone[rows].fits
    assert alone[rows].step_seconds <= alone[plain].step_seconds
    assert row.peak_bytes == alone[rows].peak.expected
    assert row.step_seconds == alone[rows].step_seconds
    assert prediction.alternatives[-1] == row


def test_nothing_is_offered_where_the_whole_batch_fits():
    assert not offered(memfit.simulate(config(), **EMBEDDER, precision="fp32", device="l4"))
    assert not offered(memfit.simulate(config(), **{**EMBEDDER, "task": "reranker"}, device="l4", budget="min"))


@pytest.mark.parametrize("fixed", [0, 100])
@pytest.mark.parametrize("over", [0.0, 0.2])
def test_the_search_needs_few_rehearsals(fixed, over):
    """In three, however bad the guess: what trying every size gives, or half of that where rows share something."""
    for limit, per_row, largest, guess in itertools.product(
        (90, 200, 700, 5000), (3, 17, 90), (2, 9, 64), (0.1, 7, 999)
    ):

        def peak(rows, per_row=per_row):
            return int(fixed + per_row * rows * (1 + over / rows))

        tried = []

        def peak_of(rows, tried=tried, peak=peak):
            tried.append(rows)
            return peak(rows)

        sizes = [1 << n for n in range(10) if 1 << n < largest]
        fitting = [rows for rows in sizes if peak(rows) <= limit]
        found = largest_that_fits(guess, largest, peak_of, fixed, limit)
        assert len(tried) == len(set(tried)) <= MAX_REHEARSALS
        assert set(tried) <= set(sizes)
        best = max(fitting) if fitting else 1
        assert found in ((best,) if over == 0 else (best, max(1, best // 2)))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"], **SIZES}))
    return str(tmp_path)


STEP = ["--batch", "4", "--seq", "64", "--group", "4", "--gpu", "l4"]


def test_the_command_line(folder, capsys):
    """What does not fit whole fits in sub-batches, and says so."""
    sizes = ["--dtype", "fp32", "--json"]
    found = []
    for words in ([], ["--budget", "min"], ["--sub-batch", "1", "--budget", "min"]):
        assert main(["plan", folder, *STEP, *sizes, *words]) == 0
        found.append(json.loads(capsys.readouterr().out)["peak_bytes"]["high"])
    assert found[0] > found[1] > found[2]
    budget = str((found[1] + found[2]) // 2)
    assert main(["plan", folder, *STEP, *sizes, "--budget", budget]) == 3
    row = json.loads(capsys.readouterr().out)["alternatives"][-1]
    name, _, rows = row["name"].rstrip(")").rpartition(" ")
    assert name == "memfit, gradient caching (sub-batches of"
    assert row["peak_bytes"] <= int(budget)
    assert main(["plan", folder, *STEP, *sizes, "--budget", budget, "--sub-batch", rows]) == 0
    same = json.loads(capsys.readouterr().out)
    assert same["peak_bytes"]["expected"] == row["peak_bytes"]
    assert same["step_seconds"] == row["step_seconds"]
    assert not [each for each in same["alternatives"] if "gradient caching" in each["name"]]
    assert main(["plan", folder, *STEP, "--dtype", "fp32", "--budget", budget, "--sub-batch", rows]) == 0
    assert f"BertModel in sub-batches of {rows} on l4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "0"], "`--temperature 0.0` is not above 0"),
        (["--sub-batch", "0"], "`--sub-batch 0` is below 1"),
        (["--sub-batch", "4", "--task", "classification"], "Sub-batches are for contrastive batches"),
        (["--sub-batch", "4", "--task", "reranker"], "`--task embedder`"),
    ],
)
def test_errors(folder, capsys, words, message):
    assert main(["plan", folder, *STEP, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_module_is_no_contrastive_step():
    with pytest.raises(UsageError, match="contrastive batches"):
        memfit.simulate(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.ones(2, 4), cache_rows=2)
