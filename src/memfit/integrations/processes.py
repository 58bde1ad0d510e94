"""Processes that a script starts to train on several devices: what they run, runs under Memfit too.

`llamafactory.cli train` starts `torchrun`; a Trainer of Lightning starts its own script again, once for every further
device. Without this those processes would train unfitted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

LLAMA_FACTORY = "llamafactory.launcher"
LIGHTNING = tuple(
    f"{package}.strategies.launchers.subprocess_script"
    for package in ("lightning.fabric", "lightning.pytorch", "lightning_fabric", "pytorch_lightning")
)

_TORCHRUN = "torchrun"


def starts_memfit(subprocess: ModuleType, change: Callable[[Any], list[str] | None]) -> SimpleNamespace:
    """What takes the place of the module `subprocess` in a module that starts processes.

    Args:
        change: Makes the command that runs under Memfit; ``None`` leaves it alone.
    """

    def starting(start: Callable[..., Any]) -> Callable[..., Any]:
        def started(command: Any, *args: Any, **kwargs: Any) -> Any:
            return start(change(command) or command, *args, **kwargs)

        return started

    ways = {name: starting(getattr(subprocess, name)) for name in ("run", "Popen")}
    return SimpleNamespace(**{**vars(subprocess), **ways})


def torchrun_under_memfit(command: Any, words: Sequence[str]) -> list[str] | None:
    """A `torchrun` command whose script, its first word that is a Python file, runs under Memfit; others: ``None``.

    Args:
        words: What stands between `memfit` and the script.
    """
    if not isinstance(command, list | tuple) or not command or command[0] != _TORCHRUN:
        return None
    parts = [str(word) for word in command]
    script = next((i for i, word in enumerate(parts) if word.endswith(".py")), None)
    if script is None:
        return None
    # The `torchrun` of this Python: another one on the path would not find Memfit.
    launch = [sys.executable, "-m", "torch.distributed.run", *parts[1:script]]
    return [*launch, "-m", "memfit", *words, "--", *parts[script:]]


def python_under_memfit(command: Any, words: Sequence[str]) -> list[str] | None:
    """A command of this Python that runs a script or a module, under Memfit; others: ``None``."""
    if not isinstance(command, list | tuple) or len(command) < 2 or command[0] != sys.executable:
        return None
    return [sys.executable, "-m", "memfit", *words, "--", *map(str, command[1:])]
