"""DeepSpeed's own activation checkpointing, while the forward of a fitted model runs: it does not, the plan does.

A model may call `deepspeed.checkpointing.checkpoint` itself, and a `PipelineModule` calls what it was given for every
``activation_checkpoint_interval`` layers. Both run their function twice, the first time without a graph, where there is
nothing to plan for. So what they were to run is run once, as it is; the same segments, so that a pipeline seeds its
layers as it did. An ``activation_checkpointing`` block in the JSON only configures these functions.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from memfit.partitioned import engine_around

_MODULE = "deepspeed.runtime.activation_checkpointing.checkpointing"
_CALLED = "`deepspeed.checkpointing.checkpoint` was taken over: the plan decides for each saved tensor instead"
_PIPELINE = "`activation_checkpoint_interval={}` was taken over: the plan decides for each saved tensor instead"
_IDLE = (
    "`activation_checkpointing` in DeepSpeed's configuration does nothing here: this model never calls "
    "`deepspeed.checkpointing.checkpoint`"
)
_LOOKS = 8
"""Forwards of which one may run within an engine; some are called before."""


class Takeover:
    """What DeepSpeed was told about checkpointing a model, and what becomes of it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.called = False
        self._model = weakref.ref(model)
        self._configured = False
        self._looks = 0
        self._intervals: dict[str, None] = {}
        self._undo: list[Callable[[], None]] = []

    def notes(self) -> Iterable[str]:
        """One line for each switch that was set."""
        if self.called:
            yield _CALLED
        yield from self._intervals
        if self._configured and not self.called and not self._intervals:
            yield _IDLE

    def enter(self) -> None:
        """A training forward begins."""
        checkpointing: Any = sys.modules.get(_MODULE)
        model = self._model()
        if checkpointing is None or model is None or self._undo:
            return
        if self._looks < _LOOKS and not self._configured:
            self._looks += 1
            config = getattr(engine_around(model), "_config", None)
            self._configured = "activation_checkpointing" in (getattr(config, "_param_dict", None) or {})
        self._replace(checkpointing, "CheckpointFunction", _Once(self))
        interval = getattr(model, "activation_checkpoint_interval", 0)
        if isinstance(interval, int) and interval > 0 and hasattr(model, "activation_checkpoint_func"):
            self._intervals[_PIPELINE.format(interval)] = None
            self._replace(model, "activation_checkpoint_func", _once)

    def leave(self) -> None:
        """It is over."""
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before))


class _Once:
    """In the place of `CheckpointFunction`, whose ``apply`` adds the outputs to a list."""

    def __init__(self, takeover: Takeover) -> None:
        self._takeover = takeover

    def apply(self, function: Callable[..., Any], outputs: list[Any], *args: Any) -> None:
        self._takeover.called = True
        found = function(*args)
        outputs.extend([found] if isinstance(found, torch.Tensor) else found)


def _once(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
