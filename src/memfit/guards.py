"""Torch's own check that tensors are what others were: type, dispatch keys, dtype, device, geometry, `requires_grad`.

One call in C++ for many tensors, a twentieth of what the comparison in Python takes. What it refuses need not differ: a
mode may have changed the dispatch keys. So a yes counts, and a no means that Python has to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Guard(Protocol):
    """Compares tensors with those that it was made of."""

    def check(self, *tensors: torch.Tensor) -> bool:
        """Whether they are alike for certain."""


class _Never:
    """Where torch has no guards: Python looks every time."""

    def check(self, *tensors: torch.Tensor) -> bool:
        return False


def guard_of(tensors: Sequence[torch.Tensor]) -> Guard:
    """A guard made of ``tensors``."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        guard: Guard = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guard
    except Exception:  # private to torch: whatever it says, there is another way
        return _Never()
