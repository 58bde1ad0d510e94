"""Smaller forms that lose nothing, and what they cost."""

from __future__ import annotations

import pytest
import torch

from memfit import hardware
from memfit.bits import same_bits
from memfit.narrowing import narrow_form, narrow_seconds, widen
from memfit.simulation.ledger import Ledger
from memfit.simulation.rates import rates

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.37])
def test_a_mask_comes_back_to_the_last_bit(dtype: torch.dtype, rate: float) -> None:
    mask = torch.empty(7, 33, dtype=dtype).bernoulli_(1 - rate)
    mask.div_(1 - rate)
    form = None, float(mask.max())
    small = narrow_form(mask, form)
    assert small.dtype is torch.bool
    assert same_bits(widen(small, dtype, form), mask)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_an_upcast_comes_back_to_the_last_bit(source: torch.dtype) -> None:
    value = torch.randn(7, 33).to(source).float()
    value[0, :3] = torch.tensor([float("inf"), -0.0, 0.0])
    small = narrow_form(value, (source, 1.0))
    assert small.nbytes == value.nbytes // 2
    assert same_bits(widen(small, torch.float32, (source, 1.0)), value)


def test_on_cpu_it_is_measured_and_grows_with_the_value() -> None:
    """Beyond a sample it takes as long per byte as the sample does."""
    seconds = narrow_seconds(CPU, 16 * MIB, torch.float32, None)
    assert 16 * MIB / 1e12 < seconds < 10
    assert narrow_seconds(CPU, 64 * MIB, torch.float32, None) == 4 * seconds
    assert narrow_seconds(CPU, 1, torch.float32, torch.bfloat16) > 0


@pytest.mark.parametrize(("narrow", "moved"), [(torch.bfloat16, 2 * 96), (None, 2 * 80 + 128)])
def test_predictions_price_it_for_their_device(narrow: torch.dtype | None, moved: int) -> None:
    """Two casts, and for a mask a product in place: in MiB that the device's memory moves."""
    entry = hardware.find("h100")
    seconds = Ledger(rates(entry)).narrow_seconds(CPU, 64 * MIB, torch.float32, narrow)
    ideal = moved * MIB / entry.memory_bytes_per_second
    assert ideal < seconds < 2 * ideal
