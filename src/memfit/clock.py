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

    def tick(self) -> None:
        """A step begins."""
        now = time.perf_counter()
        if self._began is not None:
            self._seconds.append(now - self._began)
            del self._seconds[:-KEPT]
        self._began = now

    def skip(self) -> None:
        """The step that has begun does not count: it is profiled."""
        self._began = None

    def median(self) -> float | None:
        """``None`` before the first step that counts has ended."""
        if not self._seconds:
            return None
        return sorted(self._seconds)[len(self._seconds) // 2]
