"""LLaMA-Factory: its own switches for activation checkpointing, and the `torchrun` that its command line starts.

It checkpoints activations unless it is told not to, by a method that it binds to the model itself: what was asked for
is read where it does so, from its own arguments. With several devices `llamafactory.cli train` starts `torchrun`, whose
processes would train without Memfit; the same command is started with `memfit run` in it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from memfit.integrations.switches import Switches

if TYPE_CHECKING:
    import torch

CHECKPOINTING = "llamafactory.model.model_utils.checkpointing"
LAUNCHER = "llamafactory.launcher"

_TORCHRUN = "torchrun"


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


def starts_memfit(subprocess: ModuleType, words: Sequence[str], told: Callable[[], None]) -> SimpleNamespace:
    """What takes the place of the module `subprocess` in LLaMA-Factory's launcher: its `torchrun` runs under Memfit.

    Args:
        words: What stands between `memfit` and the script.
        told: Hears of a start.
    """

    def run(command: Any, *args: Any, **kwargs: Any) -> Any:
        changed = under_memfit(command, words)
        if changed is not None:
            told()
        return subprocess.run(changed or command, *args, **kwargs)

    return SimpleNamespace(**{**vars(subprocess), "run": run})


def under_memfit(command: Any, words: Sequence[str]) -> list[str] | None:
    """A `torchrun` command whose script, its first word that is a Python file, runs under Memfit; others: ``None``."""
    if not isinstance(command, list | tuple) or not command or command[0] != _TORCHRUN:
        return None
    parts = [str(word) for word in command]
    script = next((i for i, word in enumerate(parts) if word.endswith(".py")), None)
    if script is None:
        return None
    # The `torchrun` of this Python: another one on the path would not find Memfit.
    launch = [sys.executable, "-m", "torch.distributed.run", *parts[1:script]]
    return [*launch, "-m", "memfit", *words, "--", *parts[script:]]
