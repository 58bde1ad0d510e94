"""Keep a value in a smaller form that loses nothing: a mask as bool, an upcast as what it came from."""

from __future__ import annotations

import torch


def widen(tensor: torch.Tensor, dtype: torch.dtype, narrow: tuple[torch.dtype | None, float]) -> torch.Tensor:
    """Undo `narrow_form`."""
    wide = tensor.to(dtype)
    return wide.mul_(narrow[1]) if narrow[0] is None and narrow[1] != 1.0 else wide


def narrow_form(tensor: torch.Tensor, narrow: tuple[torch.dtype | None, float]) -> torch.Tensor:
    """The smaller tensor that carries the same information: a bool mask, or the dtype before the upcast."""
    return tensor != 0 if narrow[0] is None else tensor.to(narrow[0])
