"""What is predicted for ZeRO, against DeepSpeed itself: two and four processes, gloo on CPU, every tensor counted."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

import memfit
from memfit.forecast import Forecast
from memfit.simulation.ledger import Ledger
from memfit.solver.planner import switched
from ranks import in_turn, run, values
from test_deepspeed import ENVIRONMENT, FULL, SMALLEST, start

WITHIN = 0.03
"""As promised."""
HIDDEN = 128
CELLS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 1, bf16": {"stage": 1, "dtype": torch.bfloat16},
    "stage 2, bf16": {"stage": 2, "dtype": torch.bfloat16},
    "stage 2, frozen": {"stage": 2, "frozen": True},
    "stage 1, accumulating": {"stage": 1, "accumulate": 2},
    "stage 2, accumulating": {"stage": 2, "accumulate": 2},
    "stage 2, short": {"stage": 2, "length": 16},
    "stage 1, short": {"stage": 1, "length": 16},
    "stage 3": {"stage": 3},
    "stage 3, bf16, accumulating": {"stage": 3, "dtype": torch.bfloat16, "accumulate": 2},
    "stage 3, frozen": {"stage": 3, "frozen": True},
    "stage 3, bf16, checkpointed": {"stage": 3, "checkpointed": True, "dtype": torch.bfloat16},
    "stage 3, recipes": {"stage": 3, "fitting": SMALLEST},
    "stage 3, frozen, full": {"stage": 3, "frozen": True, "fitting": FULL},
}
AUTO = {
    "stage3_prefetch_bucket_size": HIDDEN * HIDDEN * 9 // 10,
    "stage3_param_persistence_threshold": 10 * HIDDEN,
}
"""What ``auto`` in a Trainer's configuration comes to."""
FOUR = ["stage 1", "stage 2, bf16", "stage 3, bf16, checkpointed"]


def make_model(cell: dict[str, Any]) -> torch.nn.Module:
    from training import llama

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 344, "vocab_size": 1000, "max_position_embeddings": 512}
    model = llama(num_layers=5, dropout=0.0, use_cache=False, **sizes).train()
    if cell.get("frozen"):
        model.get_input_embeddings().requires_grad_(False)
        model.model.layers[0].requires_grad_(False)
    return model


def make_batch(cell: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 1000, (2, cell.get("length", 192)), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def measured(name: str) -> int:
    """The most bytes of tensors in a later step of this rank."""
    cell, deepspeed = CELLS[name], start()
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": cell.get("accumulate", 1),
        "zero_optimization": {"stage": cell["stage"], "reduce_bucket_size": HIDDEN * HIDDEN, **cell.get("zero", AUTO)},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": cell.get("dtype") is torch.bfloat16},
    }
    ledger = Ledger(lambda *_: 0.0)
    gc.collect()
    before = list(tensors())
    fitting = cell.get("fitting")
    model, batch = make_model(cell), make_batch(cell)
    if cell.get("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings, dist_init_required=False)
    gc.collect()
    old = {tensor.untyped_storage()._cdata for tensor in before}
    ledger.see(tensor for tensor in tensors() if tensor.untyped_storage()._cdata not in old)

    def step() -> None:
        for _ in range(cell.get("accumulate", 1)):
            engine.backward(engine(**batch).loss)
            engine.step()

    with ledger:
        for _ in range(3):
            gc.collect()
            ledger.reset_peak()
            step()
        gc.collect()
    peak = ledger.peak if fitting is None else measured_fitted(ledger.now, model, fitting, step)
    engine.destroy()
    return peak


def measured_fitted(held: int, model: torch.nn.Module, fitting: dict[str, Any], step: Callable[[], None]) -> int:
    """Memfit lets nobody else see its ops, so a profiler takes the place of the ledger: the lesser of two."""
    handle = memfit.fit(model, **fitting)
    for _ in range(4):
        step()  # programs are recorded and verified
    peaks = []
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
        events = profile.profiler.kineto_results.events()
        found = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        peaks.append(held + max(itertools.accumulate((size for _, size in found), initial=0)))
    assert {block["mode"] for block in handle.summary()["blocks"]} == {"fallback" if fitting == FULL else "replay"}
    handle.remove()
    return min(peaks)


def tensors() -> Iterator[torch.Tensor]:
    """All that there are in Python, which is where DeepSpeed keeps what it makes."""
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            yield thing


def play(names: list[str]) -> dict[str, Any]:
    return in_turn({name: partial(measured, name) for name in names}, names)


@functools.cache
def real(ranks: int, stage: int) -> list[Any]:
    """What ranks have measured: of the cells of a stage on two, of those in `FOUR` on four."""
    chosen = [name for name, cell in CELLS.items() if cell["stage"] == stage] if ranks == 2 else FOUR
    return run(play, chosen, ranks=ranks, environment=ENVIRONMENT, deadline=250.0)


def predicted(name: str, num_devices: int) -> int:
    cell = CELLS[name]
    model = make_model(cell).to(cell.get("dtype", torch.float32))
    more = {"accumulate": cell.get("accumulate", 1)}
    forecast = Forecast(model, make_batch(cell), num_devices=num_devices, zero=cell["stage"], **more)
    if cell.get("checkpointed") or cell.get("fitting") == FULL:
        return forecast.within("min").plan.predicted_peak_bytes
    return switched(
        forecast.profile, policy="full" if "fitting" in cell else "plain", **forecast.named
    ).predicted_peak_bytes


@pytest.mark.parametrize(("ranks", "name"), [*((2, name) for name in CELLS), *((4, name) for name in FOUR)])
def test_the_peak_is_that_of_real_ranks(name, ranks):
    outcomes = values(real(ranks, CELLS[name]["stage"] if ranks == 2 else 0))
    actual = max(values([outcome[name] for outcome in outcomes]))
    assert predicted(name, ranks) == pytest.approx(actual, rel=WITHIN)
