"""What Python reads past the dispatcher: tensors' data, and its own random numbers (design, rule 12)."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

_LAUNCHER = "triton"
_LAUNCHER_DEPTH = 2  # its launchers ask themselves, or a function that they have generated does

READERS = ("tolist", "numpy", "__array__", "__dlpack__", "data_ptr")


def python_random_state() -> tuple[object, object]:
    """Of `random`, and of NumPy where it is loaded; to be compared."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    return random.getstate(), None if state is None else (state[0], state[1].tobytes(), *state[2:])


def patch_readers(
    note: Callable[[str], None], launched: Callable[[torch.Tensor], None]
) -> list[tuple[str, Callable[..., Any] | None]]:
    """Replace the methods by which Python reads data past the dispatcher; returns what stood in their places.

    Args:
        note: Told which method was called.
        launched: Told of a tensor whose address a Triton kernel is given instead: nothing in Python depends on that.
    """
    return [(name, _patch(note, launched, name)) for name in READERS]


def restore_readers(before: list[tuple[str, Callable[..., Any] | None]]) -> None:
    """Undo `patch_readers`."""
    while before:
        name, original = before.pop()
        if original is None:
            delattr(torch.Tensor, name)
        else:
            setattr(torch.Tensor, name, original)


def _patch(note: Callable[[str], None], launched: Callable[[torch.Tensor], None], name: str) -> Any:
    before = torch.Tensor.__dict__.get(name)
    original = getattr(torch.Tensor, name)

    def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if name == "data_ptr" and _launches(sys._getframe(1)):
            launched(self)
        else:
            note(f"{name}()" if not name.startswith("__") else name)
        return original(self, *args, **kwargs)

    setattr(torch.Tensor, name, read)
    return before


def _launches(frame: FrameType | None) -> bool:
    """Whether a frame belongs to a launch of Triton's."""
    for _ in range(_LAUNCHER_DEPTH):
        if frame is None:
            return False
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == _LAUNCHER:
            return True
        frame = frame.f_back
    return False
