"""`torch.utils.checkpoint` that a model calls by itself: it is left alone, and the report says so.

What the model's switch does (`gradient_checkpointing_enable()`) is another matter: that is taken over (`modes`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import torch

WHOLE = "the model checkpoints its blocks itself (`torch.utils.checkpoint`); remove that, and they are planned for"
_MODULE = "torch.utils.checkpoint"
_NODE = "CheckpointFunctionBackward"
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def is_inside() -> bool:
    """Whether a forward that will run again, as the non-reentrant kind has it, is under way."""
    top = _top_hooks(True)
    return top is not None and getattr(top[0], "__module__", "") == _MODULE


def runs_again() -> bool:
    """Whether the reentrant kind is running something again, in a backward."""
    if torch._C._current_graph_task_id() == -1:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "backward" and frame.f_globals.get("__name__") == _MODULE:
            return True
        frame = frame.f_back
    return False


def report(note: Callable[[str, str], None], block: str, graph: tuple[object, ...], *, seen: bool) -> None:
    """Say that a block which was recorded checkpoints a part of itself, in either way."""
    if seen or any(isinstance(node, tuple) and node[0] == _NODE for node in graph):
        note(
            "checkpointed",
            f"`{block}` checkpoints a part of itself (`torch.utils.checkpoint`), as others may: that part is left "
            "alone, and runs again as a whole",
        )
