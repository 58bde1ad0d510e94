"""Keeps what the process holds within the budget of a planned step (CPU), and reads the step's peak.

What an allocator holds but nobody uses is part of the resident set. Most of it serves the tensors that come next; what
is too scattered for them lies there while memory grows elsewhere. Where the allocator takes a limit, it hands back what
is in the way, when it is in the way. Elsewhere all that is free goes back at the moments of a step after which memory
could otherwise grow beyond the budget; and glibc gives large tensors mappings of their own, unless steps stay far from
the budget.
"""

from __future__ import annotations

from memfit.heap import heap
from memfit.limits import START, Limits, Moment
from memfit.mappings import mappings
from memfit.memory import Meter

MARGIN_SHARE = 0.004
"""Of a budget, for what grows beside the heap: code that runs first, stacks."""
SCATTER_SHARE = 0.5
"""Of what is to come, for what does not fit where something was freed: a process under glibc grew by 87 MiB where
tensors grew by 78, with large ones mapped."""
NO_LIMITS = Limits()


class Keeper:
    """Of the process, on behalf of one fitted model.

    On CUDA memory goes back only before a step, if more than the budget is held: that allocator joins what it frees.

    Attributes:
        highest: What was held at most since `restart`, as far as `observe` has read it.
        closed: Whether the step's peak is known: its optimizer has stepped.
        limits: In force.
    """

    def __init__(self, meter: Meter | None = None) -> None:
        """Of the device of ``meter``; without one it does nothing."""
        self._meter = meter
        self._keeps = meter is not None and meter.device.type == "cpu"
        self._heap = heap() if self._keeps else None
        self._mappings = mappings() if self._keeps else None
        self.highest = 0
        self.closed = False
        self.limits = NO_LIMITS

    @property
    def limits_heap(self) -> bool:
        """Whether the allocator itself keeps the limit."""
        return self._heap is not None

    def begin(self, limits: Limits) -> None:
        """A step begins under these."""
        self.limits = limits
        if self._meter is not None and not self._keeps and limits.budget and self._meter.now() > limits.budget:
            self._meter.release()  # what an evaluation has taken, say
        if self._heap is None:
            if limits.budget:
                self._map(bool(limits.growths))
            self.reach(START)
        elif limits.budget:
            self._heap.limit(limits.budget - int(MARGIN_SHARE * limits.budget))
        else:
            self._heap.lift()

    def minds(self, moment: Moment) -> bool:
        """Whether it has to hear of a moment."""
        return self._keeps and self._heap is None and moment in self.limits.growths

    def reach(self, moment: Moment) -> None:
        """A moment of the step: make room for what comes next."""
        if self._meter is None or not self.minds(moment):
            return
        if self._meter.now() + (1 + SCATTER_SHARE) * self.limits.growths[moment] > self.limits.budget:
            self._meter.release()

    def relax(self) -> None:
        """Nothing is planned any more."""
        self.limits = NO_LIMITS
        self._map(False)
        if self._heap is not None:
            self._heap.lift()

    def restart(self) -> None:
        """A step is over: its peak no longer counts."""
        if self._meter is not None:
            self._meter.reset_peak()
        self.highest, self.closed = 0, False

    def observe(self) -> int:
        """Read the highest that was held in this step so far, should somebody else forget it; returns it."""
        if self._meter is not None and not self.closed:
            self.highest = max(self.highest, self._meter.peak())
        return self.highest

    def close(self, *, final: bool) -> None:
        """An optimizer has stepped; if ``final``, what follows is no part of the step, such as an evaluation."""
        self.closed = False  # of two optimizers the second one's step counts too
        self.observe()
        self.closed = final

    def _map(self, on: bool) -> None:
        if self._mappings is None:
            return
        if on:
            self._mappings.hold(self)
        else:
            self._mappings.let_go(self)
