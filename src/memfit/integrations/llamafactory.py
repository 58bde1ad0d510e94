"""LLaMA-Factory's own switches for activation checkpointing.

It checkpoints activations unless it is told not to, by a method that it binds to the model itself: what was asked for
is read where it does so, from its own arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memfit.integrations.switches import Switches

if TYPE_CHECKING:
    import torch

CHECKPOINTING = "llamafactory.model.model_utils.checkpointing"


class LlamaFactorySwitches(Switches):
    """`disable_gradient_checkpointing`, `use_reentrant_gc` and `use_unsloth_gc`, as its model arguments have them."""

    def __init__(self, arguments: Any) -> None:
        """Read them. A switch that this version does not have is not set."""
        self.is_disabled = getattr(arguments, "disable_gradient_checkpointing", False) is True
        flag = "" if self.is_disabled else "disable_gradient_checkpointing: false"
        super().__init__(flag, {"use_reentrant_gc": getattr(arguments, "use_reentrant_gc", None)})
        if getattr(arguments, "use_unsloth_gc", False) is True:
            self.kwargs["use_unsloth_gc"] = True

    def taken_over(self, name: str, *, decided: bool) -> list[str]:
        """The same: they are those of a file of options, not of a call of the model."""
        return self.notes(decided=decided)

    def notes(self, *, decided: bool) -> list[str]:
        """One line for each switch that says something."""
        instead = "the plan decides for each saved tensor instead" if decided else "blocks recompute all they can"
        if self.is_disabled:
            if not decided:
                return []
            return ["`disable_gradient_checkpointing: true` was taken over: what the budget needs is recomputed"]
        lines = [f"`{self.flag}` (LLaMA-Factory's default) was taken over: {instead}"]
        if self.kwargs.get("use_unsloth_gc"):
            lines.append(
                "`use_unsloth_gc: true` was taken over: nothing is copied to the host, and what is recomputed draws "
                "the random numbers that the forward drew, which that path does not"
            )
        elif isinstance(self.kwargs["use_reentrant_gc"], bool):
            value = "true" if self.kwargs["use_reentrant_gc"] else "false"
            lines.append(
                f"`use_reentrant_gc: {value}` was taken over: blocks do not run again as a whole, so neither way of "
                "doing that applies"
            )
        return lines


def tell_switches(
    original: Callable[..., Any], told: Callable[[torch.nn.Module, Switches], None]
) -> Callable[..., Any]:
    """LLaMA-Factory's `prepare_model_for_training`, which tells what was asked for before it prepares the model."""

    @functools.wraps(original)
    def prepare_model_for_training(model: torch.nn.Module, model_args: Any, *args: Any, **kwargs: Any) -> Any:
        told(model, LlamaFactorySwitches(model_args))
        return original(model, model_args, *args, **kwargs)

    return prepare_model_for_training
