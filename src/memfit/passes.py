"""Backward passes: what frames cache while one runs, and what the canary has still to compare at its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from memfit.canary import Doubts, Pair
from memfit.signature import numeric_flags


class Caching(Protocol):
    """A frame."""

    def end(self) -> None:
        """The pass is over: what was cached for it is freed."""


class _Passes:
    """Of all frames, by the number that autograd gives a pass; a callback of autograd's ends each."""

    def __init__(self) -> None:
        self._frames: dict[int, list[Caching]] = {}
        self._doubts: dict[int, Doubts] = {}
        self._lock = threading.Lock()
        self._flags: tuple[int, tuple[Any, ...]] = (-1, ())

    def flags(self, task: int) -> tuple[Any, ...]:
        """The numeric flags under which a pass runs, read once."""
        known, flags = self._flags
        if known != task or task == -1:
            flags = numeric_flags()
            self._flags = (task, flags)
        return flags

    def add(self, task: int, frame: Caching) -> None:
        """A frame caches something in a pass."""
        with self._lock:
            frames = self._frames.get(task)
            if frames is not None:
                frames.append(frame)
                return
            stale = [t for t in {*self._frames, *self._doubts} if t < task - 64]  # their backward raised: no callback
            for t in stale:
                self._doubts.pop(t, None)
                for old in self._frames.pop(t, []):
                    old.end()
            self._frames[task] = [frame]
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self.finish(task))

    def judge(self, seen: float | list[Pair], judge: Callable[[float], None]) -> None:
        """Act on what `Samples.compare` found: on a device at the end of the pass that runs, else at once.

        Args:
            seen: A distance, or what has still to be compared.
            judge: Called with the distance in units in the last place, if there is one.
        """
        if isinstance(seen, float):
            judge(seen)
            return
        task = torch._C._current_graph_task_id()
        now = task == -1 or seen[0][0].device.type == "cpu"
        with self._lock:
            doubts = Doubts() if now else self._doubts.setdefault(task, Doubts())
            for pair in seen:
                doubts.add(pair, judge)
        if now:
            _settle(doubts)

    def settle(self) -> None:
        """Compare now: an optimizer is about to step, perhaps in the middle of a pass."""
        if self._doubts:
            with self._lock:
                doubts = self._doubts.pop(torch._C._current_graph_task_id(), None)
            _settle(doubts)

    def finish(self, task: int) -> None:
        """A pass has reached its end."""
        with self._lock:
            frames = self._frames.pop(task, [])
            doubts = self._doubts.pop(task, None)
        for frame in frames:
            frame.end()
        _settle(doubts)

    def clear(self) -> None:
        """Forget what was cached for passes that never ended; of doubts not, another thread's may still be running."""
        with self._lock:
            failed, self._frames = self._frames, {}
        for frames in failed.values():
            for frame in frames:
                frame.end()


def _settle(doubts: Doubts | None) -> None:
    if doubts is not None:
        with torch._C._DisableTorchDispatch():  # what Memfit does is nobody's business
            doubts.settle()


passes = _Passes()


def forget_failed_passes() -> None:
    """Free what recipes cached in a backward that raised; called when the next forward begins."""
    if passes._frames and torch._C._current_graph_task_id() == -1:
        passes.clear()
