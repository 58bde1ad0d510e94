"""Is a block call what was recorded? What each packed tensor must show (design, rule 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from memfit.programs import Program

if TYPE_CHECKING:
    from memfit.frames import Handle


class Checks:
    """Compares the tensors that a call packed with those of its recording: geometry, versions, aliases, numbers."""

    __slots__ = ("_constants", "_geometry", "_guards", "_places", "_versions")

    def __init__(self, program: Program) -> None:
        """Of a recorded program."""
        self._geometry: list[tuple[Any, ...]] = []
        self._versions: list[tuple[int, int]] = []
        self._places: list[tuple[int, int, int]] = []
        self._constants: list[tuple[int, Any]] = []
        self._guards: Any = None
        for index, saved in enumerate(program.saved):
            value, node = saved.value, program.nodes[saved.value.node]
            self._geometry.append((value.size, value.stride, value.dtype, saved.device))
            if node.producer is not None and not saved.is_leaf:
                self._versions.append((index, saved.version))
            if saved.is_leaf or node.producer is not None:
                self._places.append((index, node.storage, value.offset * value.dtype.itemsize))
            elif saved.constant is not None:
                self._constants.append((index, saved.constant))

    def differs(self, handles: Sequence[Handle], starts: dict[int, int]) -> str:
        """What is not as recorded, or "".

        Args:
            handles: What the call packed, in order.
            starts: Where storages begin that are known before: those of saved leaves, by storage. Is added to.
        """
        if len(handles) != len(self._geometry):
            return f"{len(handles)} saved tensors instead of {len(self._geometry)}"
        tensors: list[Any] = [handle.tensor for handle in handles]
        # NOTE [Guards]: one call in C++ says that every tensor is as it was. Where it says no, or is not there, the
        # comparison in Python decides: it also looks at dispatch keys, which a mode may change without harm.
        if self._guards is None or not self._guards.check(*tensors):
            difference = self._geometry_differs(tensors)
            if difference:
                return difference
            if self._guards is None:
                self._guards = _guards(tensors)
        for index, version in self._versions:
            if handles[index].version != version:
                return f"saved tensor {index} was written {handles[index].version} times instead of {version}"
        for index, storage, offset in self._places:
            pointer = tensors[index].data_ptr()
            if pointer and starts.setdefault(storage, pointer - offset) != pointer - offset:
                return f"saved tensor {index} views another storage"
        for index, constant in self._constants:
            now = tensors[index].item()
            if now != constant and constant == constant:
                return f"the number {constant} became {now}"
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


class _Never:
    """Where torch has no guards: the comparison in Python decides every time."""

    def check(self, *tensors: torch.Tensor) -> bool:
        return False


def _guards(tensors: Sequence[torch.Tensor]) -> Any:
    """Torch's own check of many tensors at once, made from tensors that are as recorded."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except Exception:  # private to torch: whatever it says, there is another way
        return _Never()
