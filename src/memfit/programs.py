"""A block's recorded program: what its forward computed, which values autograd saved, and where leaves come from.

A `Value` is a view (size, stride, offset, dtype) of a *node*, one version of one storage. Views are no ops: a recipe
derives a value from whatever tensor holds its node. Node indices are equal for equal programs, so that plans may name
them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import torch
from torch._ops import OpOverload

LeafKind = Literal["input", "parameter", "buffer"]

UNEQUAL = "a second run gave other bits"
UNKNOWN = "a tensor of unknown origin"
_DOWNSTREAM = "reads a value that cannot come back: "
MUTATED = "the block writes it in place"
_DEVICE_INDEX = re.compile(r"(?<=device\(type='cuda'), index=\d+")
"""In an argument such as ``device=cuda:1``: each rank has a device of its own."""


class Value(NamedTuple):
    """A view of a node; sizes in elements, ``offset`` from the start of the storage."""

    node: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class TapeRef(NamedTuple):
    """Stands for the ``index``-th tensor of a tape."""

    index: int  # type: ignore[assignment]  # the field hides `tuple.index`


class TapeOp(NamedTuple):
    """One aten call as it came, views included; results are numbered on."""

    func: OpOverload
    args: Any
    kwargs: Any
    results: tuple[int | None, ...]


class Ref(NamedTuple):
    """Stands for a tensor in the argument template of an op."""

    value: Value


class Leaf(NamedTuple):
    """Where a node that the block does not compute comes from.

    ``index`` counts the tensors among the call's arguments; parameters and buffers go by ``(submodule, name)``.
    """

    kind: LeafKind
    index: int  # type: ignore[assignment]  # the field hides `tuple.index`
    owner: str
    name: str


@dataclass(slots=True)
class ProgramNode:
    """One version of one storage.

    Attributes:
        storage: Index of the storage; versions of one storage share it.
        storage_bytes: Its size.
        value: The whole of it, as its producer or its leaf presents it.
        device: Where it lies.
        producer: Op that makes it, or ``None``.
        leaf: Where it comes from, if it is a leaf that is still what it was when the block ends.
        recomputable: Whether recipes may make it (by ops) or read it (leaf).
        reason: Why not.
        mask_scale: ``c`` if its elements are 0 or c by construction.
        narrow_dtype: The dtype that it was upcast from without loss.
        output: Whether the block returns a view of it.
        custom: Whether a custom autograd Function saved it, and may overwrite it.
        requires_grad: Of a leaf.
        unproven: Its elements were all equal, so that verifying it proved nothing.
    """

    storage: int
    storage_bytes: int
    value: Value
    device: torch.device
    producer: int | None = None
    leaf: Leaf | None = None
    recomputable: bool = False
    reason: str = ""
    mask_scale: float | None = None
    narrow_dtype: torch.dtype | None = None
    output: bool = False
    custom: bool = False
    requires_grad: bool = False
    unproven: bool = False


@dataclass(slots=True)
class ProgramOp:
    """One op that computed something.

    Attributes:
        func: The aten overload that a recipe runs (purified: it writes nothing but what it makes).
        args: Template: `Ref` where a tensor stands.
        kwargs: Likewise.
        inputs: Nodes it reads, each once.
        outputs: ``(position in the result, node)``; position ``None``: the result itself.
        target: For an in-place op: the value it writes, a view of the version before.
        target_at: Its position among the arguments.
        overwrites: An in-place op that reads nothing of its target.
        unwritten: Positions of results that it may leave as the memory was: they prove nothing, and are kept.
        random: It draws from the default generator of its device.
        snapshot: For a random op: the generator's state is taken when this many tensors have been packed.
        recomputable: Verified, and on the allow-list.
        seconds: Of one warm run.
    """

    func: OpOverload
    args: tuple[object, ...]
    kwargs: dict[str, object]
    inputs: tuple[int, ...]
    outputs: list[tuple[int | None, int]]
    target: Value | None = None
    target_at: int = 0
    overwrites: bool = False
    unwritten: tuple[int, ...] = ()
    random: bool = False
    snapshot: int | None = None
    recomputable: bool = False
    reason: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class SavedTensor:
    """One packed tensor: a view of a node, and what a later call must show to count as the same."""

    value: Value
    device: torch.device
    version: int
    is_leaf: bool
    constant: object = None


@dataclass(slots=True)
class Program:
    """What one call of a block did.

    Attributes:
        key: Hash of everything below that a plan depends on.
        nodes, ops: In order of appearance.
        saved: In pack order.
        outputs: Values that the block returns.
        graph: The autograd graph's fingerprint: node names, edges and scalars.
        tape: Every call as it came, for the fake backward of `timeline`; its leaves as (number, value); its outputs.
        writes: Why the block may not be run twice (it writes something that outlives it), or "".
        data_dependent: What Python read from tensors, or "".
        foreign: Unknown tensor types, or "".
        forward_seconds: Measured forward of the block, recording excluded where known.
        peak_bytes: Highest sum of storages alive while it ran, counted from its entry.
    """

    key: str = ""
    nodes: list[ProgramNode] = field(default_factory=list)
    ops: list[ProgramOp] = field(default_factory=list)
    saved: list[SavedTensor] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    graph: tuple[object, ...] = ()
    tape: list[TapeOp] = field(default_factory=list)
    tape_leaves: list[tuple[int, Value]] = field(default_factory=list)
    tape_outputs: list[int] = field(default_factory=list)
    writes: str = ""
    data_dependent: str = ""
    foreign: str = ""
    python_random: bool = False
    forward_seconds: float = 0.0
    peak_bytes: int = 0
    record_seconds: float = 0.0

    @property
    def not_replayable(self) -> str:
        """Why recipes may bring nothing back, or ""."""
        if self.foreign:
            return f"tensors of type {self.foreign}"
        if self.python_random:
            return "draws Python randomness"
        return f"depends on data: {self.data_dependent}" if self.data_dependent else ""

    def strays(self, home: torch.device | None) -> str:
        """Why its values are not to be planned for on the device of the block's weights, or ""."""
        for node in self.nodes if home is not None else ():
            if node.producer is not None and node.device.type != "cpu" and node.device != home:
                return f"computes on {node.device}, its weights are on {home}"
        return ""

    @property
    def unproven(self) -> int:
        """How many values proved nothing because all their elements were equal."""
        return sum(node.unproven for node in self.nodes)


def refs(template: object) -> list[Ref]:
    """Every `Ref` in an argument template, in order."""
    if isinstance(template, Ref):
        return [template]
    if isinstance(template, (tuple, list)):
        return [ref for item in template for ref in refs(item)]
    if isinstance(template, dict):
        return [ref for item in template.values() for ref in refs(item)]
    return []


def seal(program: Program) -> None:
    """Close a program: nothing is added to it any more."""
    _propagate(program)
    program.key = _key(program)


def _propagate(program: Program) -> None:
    """What depends on a value that is neither saved nor recomputable is not recomputable either."""
    saved = {s.value.node for s in program.saved}
    for op in program.ops:
        for number in op.inputs:
            source = program.nodes[number]
            available = source.recomputable or (number in saved and not source.custom and source.reason != MUTATED)
            if op.recomputable and not available:
                reason = source.reason.removeprefix(_DOWNSTREAM)
                op.recomputable, op.reason = False, _DOWNSTREAM + reason
        if not op.recomputable:
            for _, number in op.outputs:
                if program.nodes[number].recomputable:
                    program.nodes[number].recomputable, program.nodes[number].reason = False, op.reason
    for saved_tensor in program.saved:  # a saved tensor that was overwritten later: plain autograd raises, so must we
        node = program.nodes[saved_tensor.value.node]
        newer = any(n.storage == node.storage for n in program.nodes[saved_tensor.value.node + 1 :])
        if newer and node.recomputable:
            node.recomputable, node.reason = False, "a later op overwrites it"


def _key(program: Program) -> str:
    """Equal for equal programs, on every machine and rank, whatever has been written to weights and inputs before."""
    digest = sha256()
    for node in program.nodes:
        digest.update(repr((node.storage, node.storage_bytes, node.value, node.device.type, node.leaf)).encode())
    for op in program.ops:
        text = repr((str(op.func), op.args, op.kwargs, op.outputs, op.target, op.random, op.snapshot))
        digest.update(_DEVICE_INDEX.sub("", text).encode())
    made = [program.nodes[s.value.node].producer is not None and not s.is_leaf for s in program.saved]
    versions = [s.version for s, inside in zip(program.saved, made, strict=True) if inside]
    digest.update(repr([s.value for s in program.saved]).encode())
    digest.update(repr((versions, program.outputs, program.graph)).encode())
    return digest.hexdigest()[:16]
