"""What is predicted for ZeRO, against DeepSpeed itself: two and four processes, gloo on CPU, every tensor counted."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from memfit.forecast import Forecast
from memfit.simulation.ledger import Ledger
from memfit.solver.planner import switched
from ranks import in_turn, run, values
from test_deepspeed import ENVIRONMENT, start

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
}
FOUR = ["stage 1", "stage 2, bf16"]


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
        "zero_optimization": {"stage": cell["stage"], "reduce_bucket_size": HIDDEN * HIDDEN},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": cell.get("dtype") is torch.bfloat16},
    }
    ledger = Ledger(lambda *_: 0.0)
    gc.collect()
    before = list(tensors())
    model, batch = make_model(cell), make_batch(cell)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings, dist_init_required=False)
    gc.collect()
    old = {tensor.untyped_storage()._cdata for tensor in before}
    ledger.see(tensor for tensor in tensors() if tensor.untyped_storage()._cdata not in old)
    with ledger:
        for _ in range(3):
            gc.collect()
            ledger.reset_peak()
            for _ in range(cell.get("accumulate", 1)):
                engine.backward(engine(**batch).loss)
                engine.step()
    engine.destroy()
    return ledger.peak


def tensors() -> Iterator[torch.Tensor]:
    """All that there are in Python, which is where DeepSpeed keeps what it makes."""
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            yield thing


def play(names: list[str]) -> dict[str, Any]:
    return in_turn({name: partial(measured, name) for name in names}, names)


@pytest.fixture(scope="module")
def real() -> dict[int, list[Any]]:
    return {
        2: run(play, list(CELLS), ranks=2, environment=ENVIRONMENT),
        4: run(play, FOUR, ranks=4, environment=ENVIRONMENT),
    }


def predicted(name: str, num_devices: int) -> int:
    cell = CELLS[name]
    model = make_model(cell).to(cell.get("dtype", torch.float32))
    more = {"accumulate": cell.get("accumulate", 1)}
    forecast = Forecast(model, make_batch(cell), num_devices=num_devices, zero=cell["stage"], **more)
    return switched(forecast.profile, policy="plain", **forecast.named).predicted_peak_bytes


@pytest.mark.parametrize(("ranks", "name"), [*((2, name) for name in CELLS), *((4, name) for name in FOUR)])
def test_the_peak_is_that_of_real_ranks(name, ranks, real):
    actual = max(values([outcome[name] for outcome in values(real[ranks])]))
    assert predicted(name, ranks) == pytest.approx(actual, rel=WITHIN)
