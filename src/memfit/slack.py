"""Room between what a plan is predicted to need and its budget: for what the allocator cannot hand back."""

from __future__ import annotations

from memfit.fitted import Fitted
from memfit.host import allocator

MAX_CORRECTIONS = 4
SHARE = {"tcmalloc": 0.04, "jemalloc": 0.08, "glibc": 0.1}
"""Of what a step moves; a few percent on CUDA too, for blocks that the caching allocator cannot join."""
LIMITED_SHARE, LEAST_SHARE = 0.02, 0.01
"""Where the heap itself keeps a limit: of what a step moves; and of the budget, at the price of page faults."""
CUDA_SHARE = 0.05
FLOOR = 16 * 2**20
"""For what a step takes beside tensors: scratch of libraries, caches of threads, the rest of a page."""
SETTLED_STEPS = 3
ROOM_SHARE = 0.025
"""After so many planned steps, a plan that left more than this share of the budget unused is made again."""
MARGIN_SHARE = 0.02
"""Of the budget, left free beyond what its steps have shown: they differ by so much."""
CHURN_SHARE = 0.3
"""With the least slack, about so much of what a budget leaves to move is handed back and taken again in every step."""
FAULT_SECONDS = 0.6 / 2**30
"""Per byte that is taken again: page faults of 4 KiB, zeroing included."""


class Slack:
    """How much of a budget stays free: at first a share of what a plan moves, then what its steps have shown.

    Attributes:
        bytes: The room; negative where plans need less than is predicted.
        least: The room that a heap with a limit can do with, at the price of page faults: of ``least_seconds`` a step.
    """

    def __init__(self, device: str) -> None:
        """On a kind of device, ``cpu`` or ``cuda``."""
        self.bytes = self.least = 0
        self.least_seconds = 0.0
        self._share = SHARE.get(allocator(), 0.1) if device == "cpu" else CUDA_SHARE
        self._learnt = False
        self._corrections = 0

    def expect(
        self, dynamic_bytes: int, *, budget: int | None = None, base_bytes: int = 0, limited: bool = False
    ) -> None:
        """A plan will be made.

        Args:
            dynamic_bytes: What the step moves: under a budget if everything is saved, else under the plan.
            budget: That it has to hold, if there is one.
            base_bytes: What is held between steps.
            limited: Whether the heap itself keeps the limit.
        """
        if self._learnt:
            return
        share = LIMITED_SHARE if limited else self._share
        self.bytes = self.least = int(share * dynamic_bytes) + FLOOR
        if limited and budget is not None:
            self.least = min(self.bytes, int(LEAST_SHARE * budget) + FLOOR)
            self.least_seconds = CHURN_SHARE * FAULT_SECONDS * max(0, budget - base_bytes)

    def settle(self, size: int) -> None:
        """A plan was made that leaves so much room."""
        self.bytes = self.least = size

    def forget(self) -> None:
        """What steps have shown was of other work than what is profiled now."""
        self._learnt = False

    def learn(self, fitted: Fitted, *, peak_bytes: int, budget: int, smallest: bool = False) -> None:
        """Compare a step's peak with its plan; one that broke its budget, or wastes it, becomes stale.

        The ``smallest`` plan wastes nothing: there, ``budget`` is what was predicted.
        """
        if self._corrections >= MAX_CORRECTIONS:
            return
        fitted.peak = max(fitted.peak, peak_bytes)
        fitted.steps += 1
        over = fitted.peak - fitted.raw_peak
        if peak_bytes > budget:
            # A heap that has given way grows as it likes: not all of it was needed.
            self._set(self.bytes + max(FLOOR, (over - self.bytes) // 2))
            fitted.stale = True
        elif (
            not smallest
            and fitted.steps == SETTLED_STEPS
            and fitted.plan.recompute_seconds > 0
            and budget - fitted.peak > ROOM_SHARE * budget
        ):
            # Less than predicted: half of that is believed, another plan may have its peak elsewhere.
            self._set((over if over > 0 else over // 2) + max(FLOOR, int(MARGIN_SHARE * budget)))
            fitted.stale = True

    def _set(self, size: int) -> None:
        self._corrections += 1
        self._learnt = True
        self.settle(size)
