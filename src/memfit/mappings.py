"""Mappings of their own for large tensors (glibc), so that what is freed goes back at once.

glibc maps what is large and gives it back when it is freed. But what it takes for large grows with what is freed, up to
32 MiB; from then on tensors below that lie in the heap. There equal tensors do not take each other's place: torch asks
for aligned memory, for which glibc 2.36 wants a hole that is larger by the alignment. Holes stay while the heap grows.

So where steps come near a budget the threshold is fixed. The heap then stays as large as it is and is used first, warm;
what goes beyond it is mapped. (Fixed before the first step, steps take least, for many more page faults: docs/log.md.)
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref

from memfit import host

MAPPED_BYTES = 2**20
"""What is as large is mapped. At 256 KiB there are more page faults; at 4 MiB too much lies in the heap."""
_LARGEST_BYTES = 32 * 2**20
"""As large as glibc lets its own threshold grow: what it was cannot be read, nor can it be left to glibc again."""
_MMAP_THRESHOLD = -3


class Mappings:
    """Of a process whose `malloc` is glibc's."""

    def __init__(self) -> None:
        """Raises `OSError` or `AttributeError` where there is no `mallopt`."""
        self._mallopt = ctypes.CDLL(None).mallopt
        self._holders: weakref.WeakSet[object] = weakref.WeakSet()
        self._threshold: int | None = None

    def hold(self, holder: object) -> None:
        """Map large tensors for as long as somebody holds a budget."""
        self._holders.add(holder)
        self._choose()

    def let_go(self, holder: object) -> None:
        """This one holds none any more."""
        self._holders.discard(holder)
        self._choose()

    def _choose(self) -> None:
        threshold = MAPPED_BYTES if self._holders else _LARGEST_BYTES
        if threshold == self._threshold or (self._threshold is None and not self._holders):
            return
        self._threshold = threshold
        self._mallopt(_MMAP_THRESHOLD, threshold)


def _is_chosen() -> bool:
    """Whether somebody has set what is large."""
    return "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")


@functools.cache
def mappings() -> Mappings | None:
    """Of this process, where they are glibc's and nobody has chosen."""
    if host.allocator() != "glibc" or _is_chosen():
        return None
    try:
        return Mappings()
    except (OSError, AttributeError):
        return None
