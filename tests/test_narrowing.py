"""Smaller forms that lose nothing, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memfit
from memfit import frames, hardware
from memfit.bits import same_bits
from memfit.narrowing import narrow_form, narrow_seconds, widen
from memfit.plans import Policy
from memfit.profiles import ProgramProfile
from memfit.simulation.ledger import Ledger
from memfit.simulation.rates import rates
from policies import available

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


class Mixer(nn.Module):
    """Its dropout's mask is saved for one product, and what it masks for the next."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.dropout(self.up(x).tanh(), 0.3))


def narrow_masks(program: ProgramProfile) -> Policy:
    """Masks in narrow form, and beside them what recipes cannot do without."""
    narrowed = {n for n, node in enumerate(program.nodes) if node.narrow_bytes is not None}
    kept = {n for n, node in enumerate(program.nodes) if node.must_keep or node.kind == "input"} - narrowed
    assert available(program, narrowed | kept) >= set(program.saved)
    return Policy(program=program.key, kept=tuple(sorted(kept)), narrowed=tuple(sorted(narrowed)))


def test_a_mask_is_widened_once_for_all_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """First a recipe, for what is masked, then autograd; in each of two backwards through one graph."""

    def train(fitted: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(Mixer() for _ in range(3)))
        if fitted:
            memfit.fit(model, policy=narrow_masks)
        seen = []
        for _ in range(3):
            x = torch.randn(4, 8)
            loss = model(x).square().sum()
            for retain_graph in (True, False):
                count.append(0)
                loss.backward(retain_graph=retain_graph)
                seen += [p.grad.clone() for p in model.parameters()]
        return seen

    def counted(*args: Any) -> Tensor:
        count[-1] += 1
        return widen(*args)

    count: list[int] = []
    plain = train(fitted=False)
    monkeypatch.setattr(frames, "widen", counted)
    count.clear()
    assert all(same_bits(one, other) for one, other in zip(train(fitted=True), plain, strict=True))
    assert count[2:] == [3, 3, 3, 3]
