"""What a training step costs, as data: the solver's only input.

A block's program is reduced to nodes and ops. A *node* is one version of one storage: views of it are collapsed, an
in-place op makes a new node of the same storage. An *op* computes nodes from nodes. Autograd keeps *saved tensors*,
each a view of one node, packed in a fixed order; ``saved[i]`` is the node behind the i-th. Keeping a node keeps every
saved tensor that views it.

No torch here: a profile is numbers, and can be made by hand in a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NodeKind = Literal["computed", "input", "parameter", "constant"]
EventKind = Literal["forward", "outside", "backward"]
TimelineKind = Literal["alloc", "free", "unpack", "release"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One version of one storage in a block's program.

    Attributes:
        storage_bytes: Size of the storage when the node is there.
        kind: ``computed`` by an op; or a leaf: a block's ``input`` (available to recipes only if kept), a ``parameter``
            or buffer (always available, never charged), or a ``constant`` that recipes cannot bring back.
        producer: Index of the op that makes it; ``None`` for leaves.
        num_saved: How many saved tensors view it; 0: autograd does not keep it, and a plan may keep it only if it is an
            input.
        keep_bytes: What keeping it costs; ``None``: cannot be kept. 0 where something else holds the storage anyway.
        narrow_bytes: What keeping it costs in a smaller, lossless form (a bool mask, the bf16 it was upcast from), or
            ``None``.
        narrow_seconds: Time to narrow and to widen again.
        must_keep: Saved, and no recipe can bring it back.
    """

    storage_bytes: int
    kind: NodeKind = "computed"
    producer: int | None = None
    num_saved: int = 0
    keep_bytes: int | None = None
    narrow_bytes: int | None = None
    narrow_seconds: float = 0.0
    must_keep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCost:
    """One op of a program. Views are no ops; several outputs share one run.

    Attributes:
        name: The aten name, such as ``aten.addmm.default``.
        seconds: Time of one run on the profiled device.
        inputs: Nodes it reads.
        outputs: Nodes it makes.
        recomputable: Whether a recipe may run it.
    """

    name: str
    seconds: float
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    recomputable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineEvent:
    """One event of a block's backward, in the order in which it happened.

    ``alloc``/``free``: ``size`` bytes of gradients and temporaries come and go (whatever is never freed outlives the
    block: parameter gradients, the gradient of its input). ``unpack``: autograd asks for saved tensor ``index``.
    ``release``: the autograd node that held saved tensor ``index`` is done with it.
    """

    kind: TimelineKind
    index: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramProfile:
    """What one recorded program of a block costs.

    Attributes:
        key: Hash of the program; equal blocks share it.
        nodes: See `Node`.
        ops: In execution order.
        saved: The node behind each saved tensor, in pack order.
        outputs: Nodes that the block returns.
        timeline: The block's backward, policy-free.
        forward_seconds: Time of one forward pass.
        backward_seconds: Time of one backward pass.
        forward_bytes: Highest use of memory while the forward runs, counted from its entry: saved tensors are parked
            until it ends, whatever the policy.
    """

    key: str
    nodes: tuple[Node, ...]
    ops: tuple[OpCost, ...]
    saved: tuple[int, ...]
    outputs: tuple[int, ...]
    timeline: tuple[TimelineEvent, ...]
    forward_seconds: float
    backward_seconds: float
    forward_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The very tensor that the block call before returned enters this one, so that a recipe may run through that block.

    Attributes:
        input: Node of this call's program: the input that the tensor is.
        output: Node of the program of the call before: the output that it is.
    """

    input: int
    output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCall:
    """One call of a block in a training step.

    Attributes:
        name: Qualified module name, such as ``model.layers.3``.
        program: Key into `StepProfile.programs`.
        link: To the call before it in `StepProfile.calls`, if nothing else keeps the tensor between them alive.
    """

    name: str
    program: str
    link: Link | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """A moment of the step at which memory may peak.

    Attributes:
        name: What a report calls it: ``forward of model.layers.3``, ``loss``, ``optimizer``.
        kind: ``forward`` and ``backward`` belong to block call ``call``; ``outside`` to none.
        call: Index into `StepProfile.calls`, or ``None``.
        live_calls: Calls whose frames are alive, the event's own call excluded.
        outside_bytes: Everything that no plan changes: weights, gradients and optimizer state at that moment, the
            process itself, the loss.
    """

    name: str
    kind: EventKind
    call: int | None = None
    live_calls: tuple[int, ...] = ()
    outside_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """What one training step costs: the solver's input.

    Attributes:
        device: ``cpu`` or ``cuda:0``.
        programs: By key.
        calls: Block calls in forward order.
        events: In time order.
        outside_seconds: Time of the step that is spent outside the blocks.
    """

    device: str
    programs: dict[str, ProgramProfile]
    calls: tuple[BlockCall, ...]
    events: tuple[StepEvent, ...]
    outside_seconds: float = 0.0
