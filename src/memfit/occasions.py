"""Which steps are profiled beside the first: those that no plan knows, but not one after the other for ever."""

from __future__ import annotations

MAX_WAIT = 63
"""Steps between two that are profiled, if none follows a plan in between."""


class Occasions:
    """Profiling a step slows it down; it pays if steps like it come again."""

    def __init__(self) -> None:
        """Nothing has been profiled."""
        self._surprised = False
        self._fruitless = 0
        self._wait = 0

    def is_due(self, *, known: bool) -> bool:
        """Whether to profile the step that begins; ``known``: as far as its first block call tells, it has a plan."""
        if known and not self._surprised:
            return False
        if self._wait:
            self._wait -= 1
            return False
        return True

    def profiled(self) -> None:
        """A step has been."""
        self._surprised = False
        self._wait = min(2**self._fruitless - 1, MAX_WAIT)
        self._fruitless += 1

    def surprised(self) -> None:
        """A step that was not profiled ran something for which there is no plan: the next one is looked at."""
        self._surprised = True

    def followed(self) -> None:
        """A step has followed a plan from its first block call to its last."""
        self._fruitless = self._wait = 0
