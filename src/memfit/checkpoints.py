"""`torch.utils.checkpoint`, or DeepSpeed's non-reentrant one, called by a model itself: left alone, and reported.

What the model's switch does (`gradient_checkpointing_enable()`) is another matter: that is taken over (`modes`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import torch

_WHOLE = "the model checkpoints its blocks itself (`{}`); remove that, and they are planned for"
_MODULE = "torch.utils.checkpoint"
_NAMES = {
    _MODULE: _MODULE,
    "deepspeed.runtime.activation_checkpointing.checkpointing": "deepspeed.checkpointing.non_reentrant_checkpoint",
}
_NODE = "CheckpointFunctionBackward"
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _around() -> str:
    """The name of what will run this forward again, as non-reentrant kinds have it under way; or ""."""
    top = _top_hooks(True)
    return _NAMES.get(getattr(top[0], "__module__", ""), "") if top is not None else ""


def is_inside() -> bool:
    """Whether a forward that will run again, as a non-reentrant kind has it, is under way."""
    return _around() != ""


def reason() -> str:
    """Why nothing can be planned for in here; "" where nothing checkpoints."""
    name = _around() or (runs_again() and _MODULE)
    return _WHOLE.format(name) if name else ""


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
