"""One block call of a rehearsed step, and what stands for the tensors that autograd would keep of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from memfit.programs import Program, Value
from memfit.simulation.doubles import Template
from memfit.simulation.recording import FakeRecorder


@dataclass(slots=True, eq=False)
class Parked:
    """What autograd would have saved: its geometry; the tensor itself if it is a parameter, or the block returns it.

    Without geometry it is a parameter that recipes do not see.
    """

    call: Call
    index: int
    value: Value | None
    device: torch.device
    tensor: torch.Tensor | None


@dataclass(slots=True, eq=False)
class Call:
    """One block call.

    Attributes:
        tensors: Its arguments, while it runs.
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
        made: By node, storages of what autograd would have saved.
        alive: Those of them that are alive when the backward of the step begins: somebody else holds them.
        input_alive: Whether that holds for its linked input.
    """

    name: str
    index: int
    tensors: list[torch.Tensor] = field(default_factory=list)
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
    made: dict[int, StorageWeakRef] = field(default_factory=dict)
    alive: set[int] = field(default_factory=set)
    input_alive: bool = False


def saved_by(node: Any, call: Call) -> set[int]:
    """Which of a call's saved tensors a custom autograd Function saved."""
    raw = getattr(node, "_raw_saved_tensors", ()) or ()
    parked = [getattr(saved, "data", None) for saved in raw]
    return {each.index for each in parked if isinstance(each, Parked) and each.call is call}


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
