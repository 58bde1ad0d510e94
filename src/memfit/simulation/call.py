"""One block call of a rehearsed step, and what stands for the tensors that autograd would keep of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from memfit.programs import Program, Value
from memfit.sharding import as_dtensor, local
from memfit.simulation.doubles import Template
from memfit.simulation.ledger import Ledger
from memfit.simulation.recording import FakeRecorder
from memfit.simulation.whole import BackwardWatch


@dataclass(slots=True, eq=False)
class Parked:
    """What autograd would have saved: its geometry; the tensor itself if it is a parameter, or the block returns it.

    Without geometry it is a parameter that recipes do not see.

    Attributes:
        layout: Of a DTensor, whose local tensor ``value`` is.
    """

    call: Call
    index: int
    value: Value | None
    device: torch.device
    tensor: torch.Tensor | None
    layout: Any = None

    def __del__(self) -> None:
        if self.call.watch is not None:
            self.call.watch.released(self.index)

    def found(self) -> torch.Tensor:
        """What autograd gets: the tensor itself, or an empty one."""
        watch, watcher = self.call.watch, None
        if watch is not None:
            watch.unpacked(self.index)
        if self.tensor is not None:
            return self.tensor
        value, ledger = self.value, self.call.ledger
        assert value is not None
        if ledger is not None:
            ledger.watcher, watcher = None, ledger.watcher
        made = torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=self.device)
        if ledger is not None:
            ledger.watcher = watcher
        return made if self.layout is None else as_dtensor(made, self.layout)


@dataclass(slots=True, eq=False)
class Call:
    """One block call.

    Attributes:
        tensors: Its arguments, while it runs.
        inputs: Storages of its arguments.
        parked: What autograd would save, and what is returned for it, until the forward ends (late drop).
        outputs: Identity and storage of each tensor that it returned.
        program: What it ran.
        op_flops: Of each op of that.
        input: Which of its arguments is which output of the call before.
        forward_start: Bytes alive at its entry.
        forward_peak: The most since the forward of the block before, where devices work together.
        forward_seconds, forward_flops: The ledger's, then.
        forward_transient: Bytes that gathered weights took for a moment in the forward.
        backward_start: Bytes alive when its backward began.
        before_peak: The most since the backward of another block had ended, or since the last forward.
        backward_seconds, backward_flops: The ledger's, then.
        transient: Bytes that reducing its gradients took for a moment.
        gradients: Bytes of gradients, then.
        key: What equal calls share.
        template: The call that it was passed over for.
        whole: Whether it runs again as a whole, if at all.
        watch: Its backward as it happens, if it does.
        ledger: Which sees that.
        made: By node, storages of what autograd would have saved.
        alive: Those of them that are alive when the backward of the step begins: somebody else holds them.
        input_alive: Whether that holds for its linked input.
        owned: Arguments that no other call has and nobody else holds any more: a block that keeps one alone does.
    """

    name: str
    index: int
    tensors: list[torch.Tensor] = field(default_factory=list)
    inputs: list[StorageWeakRef] = field(default_factory=list)
    parked: list[tuple[Parked, torch.Tensor]] = field(default_factory=list)
    outputs: list[tuple[int, StorageWeakRef]] = field(default_factory=list)
    recorder: FakeRecorder | None = None
    hooks: Any = None
    program: Program | None = None
    op_flops: list[float] = field(default_factory=list)
    input: tuple[int, int] | None = None
    forward_start: int = 0
    forward_peak: int = 0
    forward_seconds: float = 0.0
    forward_transient: int = 0
    backward_start: int | None = None
    before_peak: int = 0
    transient: int = 0
    backward_seconds: float = 0.0
    backward_order: int = -1
    gradients: int = 0
    key: Hashable = None
    template: Template | None = None
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    watch: BackwardWatch | None = None
    ledger: Ledger | None = None
    made: dict[int, StorageWeakRef] = field(default_factory=dict)
    alive: set[int] = field(default_factory=set)
    input_alive: bool = False
    owned: set[int] = field(default_factory=set)
    whole: bool = False

    @property
    def profiled_flops(self) -> list[float]:
        """Of each op of its program's profile."""
        return [sum(self.op_flops)] if self.whole else self.op_flops


def packing(call: Call, refers_to: Callable[[torch.Tensor], bool]) -> Callable[[torch.Tensor], Parked]:
    """What takes the place of the tensors that autograd would keep of a call that is recorded.

    Args:
        call: Which is recorded.
        refers_to: Whether a tensor is a parameter that recipes do not see.
    """
    recorder = call.recorder
    assert recorder is not None
    count = 0

    def pack(tensor: torch.Tensor) -> Parked:
        nonlocal count
        alias = tensor.detach()
        if refers_to(alias):
            return Parked(call, -1, None, alias.device, alias)
        recorder.pack(alias)
        saved = recorder.program.saved[-1]
        node = recorder.program.nodes[saved.value.node]
        count += 1
        layout = None if local(alias) is alias else alias._spec  # type: ignore[attr-defined]
        parked = Parked(call, count - 1, saved.value, alias.device, None, layout)
        if node.leaf is not None and node.leaf.kind != "input":
            parked.tensor = alias
            return parked
        call.parked.append((parked, alias))
        if node.producer is not None:
            call.made[saved.value.node] = StorageWeakRef(local(alias).untyped_storage())  # type: ignore[no-untyped-call]
        return parked

    return pack


def saved_by(node: Any, call: Call) -> set[int]:
    """Which of a call's saved tensors a custom autograd Function saved."""
    raw = getattr(node, "_raw_saved_tensors", ()) or ()
    parked = [getattr(saved, "data", None) for saved in raw]
    return {each.index for each in parked if isinstance(each, Parked) and each.call is call}


def storages(tensors: Iterable[torch.Tensor]) -> list[StorageWeakRef]:
    """Where tensors lie, without keeping that."""
    return [StorageWeakRef(local(tensor).untyped_storage()) for tensor in tensors]  # type: ignore[no-untyped-call]


def look(calls: Sequence[Call]) -> None:
    """The backward of the step begins: what of each call is held by somebody else?"""
    users = Counter(number for call in calls for number in {weak.cdata for weak in call.inputs})
    for call in calls:
        call.alive = {number for number, weak in call.made.items() if not _gone(weak)}
        call.owned = {i for i, weak in enumerate(call.inputs) if users[weak.cdata] == 1 and _gone(weak)}
        if call.input is not None:
            call.input_alive = not _gone(calls[call.index - 1].outputs[call.input[1]][1])


def _gone(weak: StorageWeakRef) -> bool:
    gone: bool = weak.expired()  # type: ignore[no-untyped-call]
    return gone


def linked(calls: Sequence[Call], tensors: Sequence[torch.Tensor]) -> tuple[int, int] | None:
    """Which of a call's arguments is which output of the last of ``calls``, the very tensor."""
    if not calls:
        return None
    before = {number: (place, weak.cdata) for place, (number, weak) in enumerate(calls[-1].outputs)}
    for argument, tensor in enumerate(tensors):
        place, storage = before.get(id(tensor), (0, None))
        if storage == tensor.untyped_storage()._cdata:
            return argument, place
    return None
