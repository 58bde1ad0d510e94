"""Inputs that the model writes after the block has run: nothing may be recomputed from them (design, rule 7).

Plain autograd goes on where it does not keep such an input; a recipe would read what is no longer there. So in a
recorded call recipes start from copies, and when its backward begins the inputs are looked at again. One that was
written is, from the next recording on, no leaf of recipes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from memfit.canary import all_bits, same_bits
from memfit.storages import covers

Written = Callable[[int], None]
"""Told the index of an argument that was written."""


def copied(tensor: torch.Tensor) -> torch.Tensor | None:
    """A copy of an input that can stand for it, if there is one: it has to show all of its storage."""
    if not covers(tensor):
        return None
    copy = tensor.detach().clone()
    return copy if copy.stride() == tensor.stride() else None


def counter_of(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor with the version counter of ``tensor``: it counts on when that, and its storage, are gone."""
    counter = tensor.detach()
    counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return counter


class Inputs:
    """What one call was given, to be looked at again when its backward begins."""

    __slots__ = ("_given", "_held", "_written")

    def __init__(self, written: Written) -> None:
        """Nothing yet; ``written`` is told what was."""
        self._written = written
        self._given: list[tuple[int, torch.Tensor | None, int, weakref.ref[torch.Tensor], torch.Tensor]] = []
        self._held: list[torch.Tensor] = []

    def add(self, index: int, tensor: torch.Tensor, version: int, *, saved: bool, held: bool) -> None:
        """An argument.

        Args:
            index: Among the tensors that the call was given.
            tensor: It.
            version: That it had then.
            saved: Whether autograd keeps it: then it raises itself if the version is another one.
            held: Whether the call holds it anyway, as this object.
        """
        if held:
            self._held.append(tensor)  # no alias: whoever counts the users of its storage would count one more
        counter = None if saved else counter_of(tensor)
        self._given.append((index, counter, version, weakref.ref(tensor), all_bits(tensor.detach())))

    def look(self) -> None:
        """Say which were written; what nobody holds any more is not known to be."""
        for index, counter, version, ref, bits in self._given:
            tensor = ref()
            counted = counter is not None and counter._version != version
            unseen = tensor is not None and tensor._version == version and not same_bits(tensor.detach(), bits)
            if counted or unseen:
                self._written(index)
        self._given.clear()
        self._held.clear()
