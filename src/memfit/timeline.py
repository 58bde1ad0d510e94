"""The backward of one recorded program on fake tensors: what it allocates, frees, unpacks and lets go of, in order.

The tape of a recording is interpreted once with autograd on fake tensors (no memory, no arithmetic), and its backward
is watched by a dispatch mode. The working set of every policy is then computed from this one list in plain Python
(`solver.working_set`); a fake backward per policy would take a quarter of a second each.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.profiles import TimelineEvent
from memfit.programs import Program, TapeRef


def backward_timeline(program: Program) -> tuple[TimelineEvent, ...]:
    """The timeline of ``program``; where its tape cannot be replayed, one with a gradient for each saved tensor."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it prints a traceback where an op has no fake kernel
    try:
        events = _fake_backward(program)
    except Exception:  # whatever a fake kernel raises, the estimate below is an upper bound
        events = None
    finally:
        logger.setLevel(level)
    return tuple(events if events is not None else _estimate(program))


def _estimate(program: Program) -> list[TimelineEvent]:
    """Autograd visits saved tensors in reverse; each visit holds one gradient as large as the storage it reads."""
    events: list[TimelineEvent] = []
    for number, index in enumerate(reversed(range(len(program.saved)))):
        node = program.nodes[program.saved[index].value.node]
        size = 2 * node.storage_bytes
        events += [
            TimelineEvent(kind="unpack", index=index),
            TimelineEvent(kind="alloc", index=number, size=size),
            TimelineEvent(kind="release", index=index),
            TimelineEvent(kind="free", index=number, size=size),
        ]
    return events


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every storage that comes and goes."""

    def __init__(self, events: list[TimelineEvent]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._events = events
        self._alive: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self._number = 0
        self._known: set[int] = set()
        self._before: list[StorageWeakRef] = []

    def know(self, tensors: list[torch.Tensor]) -> None:
        """Storages that were there before."""
        # Held so that no address is used again.
        self._before = [StorageWeakRef(t.untyped_storage()) for t in tensors]  # type: ignore[no-untyped-call]
        self._known |= {weak.cdata for weak in self._before}

    def poll(self) -> None:
        """Note what has been freed since."""
        gone = [key for key, (weak, _, _) in self._alive.items() if weak.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            _, number, size = self._alive.pop(key)
            self._events.append(TimelineEvent(kind="free", index=number, size=size))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.poll()
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._alive and key not in self._known:
                    size = storage.nbytes()
                    weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._alive[key] = (weak, self._number, size)
                    self._events.append(TimelineEvent(kind="alloc", index=self._number, size=size))
                    self._number += 1
        return out


class _Packed:
    """A saved tensor of the fake step; its end is an event."""

    __slots__ = ("events", "index", "tensor")

    def __init__(self, tensor: torch.Tensor, index: int, events: list[TimelineEvent]) -> None:
        self.tensor = tensor
        self.index = index
        self.events = events

    def __del__(self) -> None:
        self.events.append(TimelineEvent(kind="release", index=self.index))


def _fake_backward(program: Program) -> list[TimelineEvent] | None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if program.data_dependent or program.foreign or not program.tape_outputs:
        return None
    events: list[TimelineEvent] = []
    num_packed = 0

    def pack(tensor: torch.Tensor) -> _Packed:
        nonlocal num_packed
        if num_packed >= len(program.saved) or tuple(tensor.shape) != program.saved[num_packed].value.size:
            raise _OtherProgram
        num_packed += 1
        return _Packed(tensor.detach(), num_packed - 1, events)

    def unpack(packed: _Packed) -> torch.Tensor:
        events.append(TimelineEvent(kind="unpack", index=packed.index))
        return packed.tensor

    with torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        tensors: dict[int, torch.Tensor] = {}
        bases: dict[int, torch.Tensor] = {}
        for number, value in program.tape_leaves:
            node = program.nodes[value.node]
            leaf = bases.get(node.storage)
            if leaf is None:
                whole = node.value
                leaf = torch.empty_strided(whole.size, whole.stride, dtype=whole.dtype, device=node.device)
                if _leaf_requires_grad(program, value.node) and leaf.dtype.is_floating_point:
                    leaf.requires_grad_(True)
                bases[node.storage] = leaf
                if leaf.requires_grad:
                    leaf = bases[node.storage] = leaf.view_as(leaf)  # so that in-place ops on inputs are allowed
            tensors[number] = (
                leaf
                if (value.size, value.stride) == (tuple(leaf.shape), leaf.stride())
                else leaf.as_strided(value.size, value.stride, max(0, value.offset - node.value.offset))
            )

        def resolve(structure: Any) -> Any:
            if isinstance(structure, TapeRef):
                return tensors[structure.index]
            if isinstance(structure, list):
                return [resolve(item) for item in structure]
            if isinstance(structure, dict):
                return {key: resolve(item) for key, item in structure.items()}
            return structure

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            for op in program.tape:
                out = op.func(*resolve(op.args), **resolve(op.kwargs))
                for result, tensor in zip(op.results, out if isinstance(out, (tuple, list)) else (out,), strict=False):
                    if result is not None:
                        tensors[result] = tensor
        if num_packed != len(program.saved):
            return None
        outputs = [tensors[number] for number in program.tape_outputs if tensors[number].requires_grad]
        seeds = [torch.empty_like(tensor) for tensor in outputs]
        watcher = _Watcher(events)
        watcher.know([*tensors.values(), *seeds, *bases.values()])
        tensors.clear()
        events.clear()
        with watcher:
            torch.autograd.backward(outputs, seeds)
            del outputs, seeds
        watcher.poll()
    return list(events)


class _OtherProgram(Exception):
    """On fake tensors autograd saves something else."""


def _leaf_requires_grad(program: Program, number: int) -> bool:
    return any(n.requires_grad for n in program.nodes if n.storage == program.nodes[number].storage)
