"""The canary: compare a few elements of every recomputed value with what the forward saved (design, rule 4)."""

from __future__ import annotations

from typing import Any

import torch

from memfit.bits import as_integers, hash_on_device, max_ulp
from memfit.programs import Value

NUM_SAMPLES = 24
FEW_ULP = 4.0

Stride = tuple[tuple[int, ...], tuple[int, ...], int]


def pattern(value: Value) -> tuple[int, int]:
    """``(step, room)`` of a strided sample of a value: element ``k`` lies ``k * step + turn % room`` behind its start.

    A dense value is sampled all over its memory; of one with gaps, only the longest contiguous run is.
    """
    length = _dense_run(value)
    step = max(length // NUM_SAMPLES, 0)
    if step == 0:
        return 0, max(length, 1)
    return step, length - step * (NUM_SAMPLES - 1)


def _dense_run(value: Value) -> int:
    length = 1
    for size, stride in sorted(zip(value.size, value.stride, strict=True), key=lambda pair: pair[1]):
        if size == 0:
            return 0
        if size == 1 or stride == 0:
            continue
        if stride != length:
            break
        length *= size
    return length


def take(tensor: torch.Tensor, step: int, offset: int) -> torch.Tensor:
    """The sample, as a view."""
    return tensor.as_strided((NUM_SAMPLES,), (step,), tensor.storage_offset() + offset)


def same(value: torch.Tensor, sample: torch.Tensor, where: int) -> bool:
    """Whether ``value`` shows the same sample. ``where`` encodes step and offset: ``step << 32 | offset``."""
    now = take(value, where >> 32, where & 0xFFFFFFFF)
    if torch.equal(now, sample):
        return True
    return torch.equal(as_integers(now.clone()), as_integers(sample))  # NaN equals NaN


def distance(value: torch.Tensor, sample: torch.Tensor, where: int) -> float:
    """Units in the last place between a value and its sample."""
    return max_ulp(take(value, where >> 32, where & 0xFFFFFFFF).clone(), sample)


def same_hash(value: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all bits of ``value`` hash as they did in the forward."""
    return torch.equal(hash_on_device(value), expected)


class Turns:
    """Whose bits are hashed: one call per program and step, in turn."""

    __slots__ = ("_before", "_now", "_step")

    def __init__(self) -> None:
        """Nothing has been called yet."""
        self._step = -1
        self._now: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def due(self, program: str, step: int) -> bool:
        """Whether this call is the one; to be asked once per call."""
        if step != self._step:
            self._step, self._before, self._now = step, self._now, {}
        place = self._now.get(program, 0)
        self._now[program] = place + 1
        return place == step % self._before.get(program, 1)


def meta(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a recomputed tensor must share with the saved one."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
