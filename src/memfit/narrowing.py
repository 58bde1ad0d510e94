"""Keep a value in a smaller form that loses nothing: a mask as bool, an upcast as what it came from."""

from __future__ import annotations

import torch

from memfit.errors import MemfitError
from memfit.programs import Program


def widen(tensor: torch.Tensor, dtype: torch.dtype, narrow: tuple[torch.dtype | None, float]) -> torch.Tensor:
    """Undo `narrow_form`."""
    wide = tensor.to(dtype)
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
