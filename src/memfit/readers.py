"""What Python reads past the dispatcher: tensors' data, and its own random numbers (design, rule 12)."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch

READERS = ("tolist", "numpy", "__array__", "__dlpack__", "data_ptr")


def python_random_state() -> tuple[object, object]:
    """Of `random`, and of NumPy where it is loaded; to be compared."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    return random.getstate(), None if state is None else (state[0], state[1].tobytes(), *state[2:])


def patch_reader(note: Callable[[str], None], name: str) -> Any:
    """Replace a method by which Python reads data past the dispatcher; returns what stood in its place, if anything."""
    before = torch.Tensor.__dict__.get(name)
    original = getattr(torch.Tensor, name)

    def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        note(f"{name}()" if not name.startswith("__") else name)
        return original(self, *args, **kwargs)

    setattr(torch.Tensor, name, read)
    return before
