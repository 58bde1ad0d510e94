"""Parameters that a block's forward sets to themselves, as a parametrization does that begins (PEFT's, around experts).

Nothing is written, but version counters count it. So a second forward before the backward would look as if weights had
changed since the first, where plain autograd, which did not save them, has nothing to say.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence

import torch


class Resets:
    """Of one block; of most there are none. Whatever else is written shows in `version`."""

    __slots__ = ("_before", "_known", "_total")

    def __init__(self) -> None:
        """None seen yet."""
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._total: Counter[int] = Counter()
        self._before: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def enter(self) -> None:
        """A forward of the block begins, whether or not it is trained on."""
        alive = {key: reference() for key, (reference, _) in self._known.items()}
        self._before = {key: tensor._version for key, tensor in alive.items() if tensor is not None}

    def leave(self) -> None:
        """It is over: what it added to a version counts if it is just what its recording saw."""
        for key, before in self._before.items():
            reference, times = self._known[key]
            tensor = reference()
            if tensor is not None and tensor._version == before + times:
                self._total[key] += times

    def learn(self, seen: Sequence[torch.Tensor]) -> None:
        """A recording has seen these, each as often as it was set."""
        for key, times in Counter(map(id, seen)).items():
            tensor = next(tensor for tensor in seen if id(tensor) == key)
            if self._is_new(tensor):
                self._total[key] = times  # `leave` knew nothing of it yet
            self._known[key] = weakref.ref(tensor), times

    def version(self, tensor: torch.Tensor) -> int:
        """Of a parameter, less what the block's own forwards have added."""
        return tensor._version - (0 if self._is_new(tensor) else self._total[id(tensor)])

    def _is_new(self, tensor: torch.Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is None or known[0]() is not tensor
