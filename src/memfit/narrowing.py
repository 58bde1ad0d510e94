"""Keep a value in a smaller form that loses nothing: a mask as bool, an upcast as what it came from."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch

from memfit.errors import MemfitError
from memfit.programs import Program

NarrowSeconds = Callable[[torch.device, int, torch.dtype, torch.dtype | None], float]
"""Time to narrow a value and to widen it again: its device, bytes and dtype, and the narrow one (``None``: a mask)."""

_SAMPLE_BYTES = 16 << 20
_BYTES_PER_SECOND = 1e12
"""Rough rate of an element-wise pass on a GPU; it decides only between forms of the same value."""


def widen(tensor: torch.Tensor, dtype: torch.dtype, narrow: tuple[torch.dtype | None, float]) -> torch.Tensor:
    """Undo `narrow_form`."""
    # A cast from bool takes twice the time of one from its bytes, which are 0 and 1 (CPU).
    wide = (tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor).to(dtype)
    return wide.mul_(narrow[1]) if narrow[0] is None and narrow[1] != 1.0 else wide


def narrow_form(tensor: torch.Tensor, narrow: tuple[torch.dtype | None, float]) -> torch.Tensor:
    """The smaller tensor that carries the same information: a bool mask, or the dtype before the upcast."""
    return tensor.to(narrow[0] or torch.bool)  # faster than a comparison with 0, see docs/log.md


def form_of(program: Program, number: int) -> tuple[torch.dtype | None, float]:
    """How a node is narrowed without loss: the dtype that it came from, or ``None`` for a mask, and its scale.

    Raises:
        MemfitError: It cannot be.
    """
    node = program.nodes[number] if 0 <= number < len(program.nodes) else None
    if node is not None and node.mask_scale is not None:
        return None, float(node.mask_scale)
    if node is not None and node.narrow_dtype is not None:
        return node.narrow_dtype, 1.0
    raise MemfitError(f"Node {number} of program {program.key} has no smaller form that loses nothing. Keep it whole.")


def narrow_seconds(device: torch.device, num_bytes: int, dtype: torch.dtype, narrow: torch.dtype | None) -> float:
    """`NarrowSeconds` of the device itself: measured on CPU, on up to 16 MiB of it; a rough rate elsewhere."""
    if device.type != "cpu":
        return 2.5 * num_bytes / _BYTES_PER_SECOND
    sample = max(min(num_bytes, _SAMPLE_BYTES), 1)
    return _measured(sample, dtype, narrow, torch.get_num_threads()) * num_bytes / sample


@lru_cache(maxsize=256)
def _measured(num_bytes: int, dtype: torch.dtype, narrow: torch.dtype | None, num_threads: int) -> float:
    """Best of three, after one that touches the memory first."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        value = torch.zeros(max(num_bytes // dtype.itemsize, 1), dtype=dtype)
        found: list[float] = []
        for _ in range(4):
            started = time.perf_counter()
            widen(narrow_form(value, (narrow, 2.0)), dtype, (narrow, 2.0))
            found.append(time.perf_counter() - started)
    return min(found[1:])
