"""The tape of a recording: every aten call as it came, for `timeline` to play back with autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from memfit.programs import Program, TapeOp, TapeRef
from memfit.storages import Storages, address_of, geometry


class Tape:
    """Writes a program's tape."""

    def __init__(self, program: Program, nodes: Storages) -> None:
        """Empty; ``nodes`` knows what the program's leaves are."""
        self.program = program
        self._nodes = nodes
        self._numbers: dict[Any, int] = {}
        self._count = 0

    def references(self, structure: Any) -> Any:
        """Arguments with their tensors replaced."""
        if isinstance(structure, torch.Tensor):
            return TapeRef(self.number(structure))
        if isinstance(structure, (list, tuple)):
            return [self.references(item) for item in structure]
        if isinstance(structure, dict):
            return {key: self.references(item) for key, item in structure.items()}
        return structure

    def number(self, tensor: torch.Tensor) -> int:
        """Tensors on the tape are known by what they view: autograd hands on aliases, not objects."""
        key = (address_of(tensor), tuple(tensor.size()), tensor.stride(), tensor.storage_offset(), tensor.dtype)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = self._count
            self._count += 1
            node = self._nodes.current.get(key[0])
            if node is None:
                node = self._nodes.unknown(tensor)
            self.program.tape_leaves.append((number, geometry(node, tensor)))
        return number

    def note(self, func: OpOverload, args: Any, kwargs: Any, out: Any) -> None:
        """One aten call, and what it gave."""
        if func is torch.ops.aten.detach.default:
            return
        numbers: list[int | None] = []
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, torch.Tensor):
                numbers.append(None)
                continue
            key = (address_of(tensor), tuple(tensor.size()), tensor.stride(), tensor.storage_offset(), tensor.dtype)
            self._numbers[key] = self._count
            numbers.append(self._count)
            self._count += 1
        self.program.tape.append(TapeOp(func, args, kwargs, tuple(numbers)))
