"""Is a block call what was recorded? What each packed tensor must show (design, rule 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter, sub
from typing import TYPE_CHECKING, Any

import torch

from memfit.guards import Guard, guard_of
from memfit.programs import Program

if TYPE_CHECKING:
    from memfit.frames import Handle


_data_ptr = torch._C.TensorBase.data_ptr


def _picker(indices: Sequence[int]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """A function that takes the items at ``indices``."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda items: tuple([items[index] for index in indices])


class Checks:
    """Compares the tensors that a call packed with those of its recording: geometry, versions, aliases, numbers."""

    __slots__ = (
        "_constants",
        "_first",
        "_first_of",
        "_firsts",
        "_geometry",
        "_guard",
        "_made",
        "_offsets",
        "_others",
        "_places",
        "_versions",
    )

    def __init__(self, program: Program) -> None:
        """Of a recorded program."""
        self._geometry: list[tuple[Any, ...]] = []
        self._places: list[tuple[int, int, int]] = []
        self._constants: list[tuple[int, Any]] = []
        self._guard: Guard | None = None
        versions: list[tuple[int, int]] = []
        for index, saved in enumerate(program.saved):
            value, node = saved.value, program.nodes[saved.value.node]
            self._geometry.append((value.size, value.stride, value.dtype, saved.device))
            if node.producer is not None and not saved.is_leaf:
                versions.append((index, saved.version))
            if saved.is_leaf or node.producer is not None:
                self._places.append((index, node.storage, value.offset * value.dtype.itemsize))
            elif saved.constant is not None:
                self._constants.append((index, saved.constant))
        # The versions of what the block made: arguments and parameters have been written before.
        self._made = _picker([index for index, _ in versions])
        self._versions = tuple([version for _, version in versions])
        # Of each storage, the saved tensor that shows it first, and by how much the others lie behind that one.
        self._first_of: dict[int, int] = {}
        self._firsts: list[tuple[int, int]] = []
        self._others: list[tuple[int, int, int]] = []
        for index, storage, offset in self._places:
            if storage not in self._first_of:
                self._first_of[storage] = len(self._firsts)
                self._firsts.append((index, offset))
            else:
                first, start = self._firsts[self._first_of[storage]]
                self._others.append((index, first, offset - start))
        self._first = _picker([index for index, _ in self._firsts])
        offsets = tuple([offset for _, offset in self._firsts])
        self._offsets = offsets if any(offsets) else None

    def differs(self, handles: Sequence[Handle], starts: dict[int, int]) -> str:
        """What is not as recorded, or "".

        Args:
            handles: What the call packed, in order.
            starts: Where storages begin that are known before: those of saved leaves, by storage. Is added to.
        """
        if len(handles) != len(self._geometry):
            return f"{len(handles)} saved tensors instead of {len(self._geometry)}"
        tensors: list[Any] = [handle.tensor for handle in handles]
        if self._guard is None or not self._guard.check(*tensors):
            difference = self._geometry_differs(tensors)
            if difference:
                return difference
            if self._guard is None:
                self._guard = guard_of(tensors)
        if self._made([handle.version for handle in handles]) != self._versions:
            return "a saved tensor was written in place another number of times"
        pointers = list(map(_data_ptr, tensors))
        if not self._lie_alike(pointers, starts):
            difference = self._places_differ(pointers, starts)
            if difference:
                return difference
        for index, constant in self._constants:
            now = tensors[index].item()
            if now != constant and constant == constant:
                return f"the number {constant} became {now}"
        return ""

    def _lie_alike(self, pointers: list[int], starts: dict[int, int]) -> bool:
        """Whether tensors share storages as recorded. A no may mean that one has no memory: `_places_differ` judges."""
        for index, first, distance in self._others:
            if pointers[index] - pointers[first] != distance:
                return False
        found = self._first(pointers)
        if self._offsets is not None:
            found = tuple(map(sub, found, self._offsets))
        first_of = self._first_of
        for storage, start in starts.items():
            if storage not in first_of or found[first_of[storage]] != start:
                return False
        return len(set(found)) == len(found)

    def _places_differ(self, pointers: list[int], starts: dict[int, int]) -> str:
        for index, storage, offset in self._places:
            pointer = pointers[index]
            if pointer and starts.setdefault(storage, pointer - offset) != pointer - offset:
                return f"saved tensor {index} views another storage"
        if len(set(starts.values())) != len(starts):
            return "saved tensors that were apart share a storage"
        return ""

    def _geometry_differs(self, tensors: Sequence[torch.Tensor]) -> str:
        for index, (tensor, (size, stride, dtype, device)) in enumerate(zip(tensors, self._geometry, strict=True)):
            if (
                tensor.shape != size
                or tensor.stride() != stride
                or tensor.dtype is not dtype
                or tensor.device != device
            ):
                return f"saved tensor {index} is {tuple(tensor.shape), tensor.stride(), tensor.dtype}"
        return ""
