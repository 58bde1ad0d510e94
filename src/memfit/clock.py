"""How long a step takes."""

from __future__ import annotations

import time

KEPT = 64


class StepClock:
    """Seconds from the beginning of one step to that of the next, of the last `KEPT` steps."""

    __slots__ = ("_began", "_seconds")

    def __init__(self) -> None:
        self._began: float | None = None
        self._seconds: list[float] = []

    def tick(self) -> float | None:
        """A step begins: the seconds of the one that is over, if that counts."""
        now = time.perf_counter()
        began, self._began = self._began, now
        if began is None:
            return None
        self._seconds.append(now - began)
        del self._seconds[:-KEPT]
        return now - began

    def skip(self) -> None:
        """The step that has begun does not count: it is profiled."""
        self._began = None

    def median(self) -> float | None:
        """``None`` before the first step that counts has ended."""
        if not self._seconds:
            return None
        return sorted(self._seconds)[len(self._seconds) // 2]
