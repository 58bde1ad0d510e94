"""What autocast does now. A call may be given tensors of one kind of device and compute on another."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype that autocast casts to on a kind of device, or ``None`` where it is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def autocast_state() -> Any:
    """The dtypes that autocast casts to, by kind of device, or ``None`` where it is off."""
    if not torch._C._is_any_autocast_enabled():
        return None
    return tuple([(kind, autocast_dtype(kind)) for kind in _kinds()])


@lru_cache(maxsize=1)
def _kinds() -> tuple[str, ...]:
    """The CPU, and the accelerator that torch was built for or has been told of."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
