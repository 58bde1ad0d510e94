"""Which node each storage shows at a moment of a recording."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from memfit import ops
from memfit.bits import all_equal, fingerprint
from memfit.programs import MUTATED, UNKNOWN, Leaf, Program, ProgramNode, ProgramOp, Ref, Value
from memfit.quantized import PLAIN_TYPES, PlainTypes
from memfit.sharding import local

SMALL_BUFFER_BYTES = 16 * 2**10
"""Buffers up to this size are copied into the frame: distributed training broadcasts them, and no version tells."""


class Storages:
    """The storages that a recording has seen, and the nodes that they went through.

    Attributes:
        plain: Classes of tensors whose ops can be recorded.
    """

    plain: PlainTypes | tuple[type, ...] = PLAIN_TYPES

    def __init__(self, program: Program) -> None:
        """Of a recording that writes into ``program``."""
        self.program = program
        self.current: dict[int, int] = {}  # storage address -> node
        self._alive: list[StorageWeakRef] = []  # keeps addresses from being used again
        self._storage_of: dict[int, int] = {}
        self._hash: dict[int, object] = {}
        self.raw: set[int] = set()  # nodes that nothing has written yet
        self._sizes: list[tuple[StorageWeakRef, int]] = []
        self._made: set[int] = set()  # by ops that are not recorded
        self._handed: dict[int, StorageWeakRef] = {}  # to kernels that torch does not see

    def new_nodes(
        self,
        index: int,
        op: ProgramOp,
        func: OpOverload,
        results: list[tuple[int | None, torch.Tensor]],
        written: list[torch.Tensor],
        hidden: bool,
    ) -> None:
        """Make the nodes of op ``index``: new versions of what it wrote, and its results."""
        program = self.program
        for tensor in written:
            address = address_of(tensor)
            old = self.current.get(address)
            if old is None:
                program.writes = program.writes or f"{ops.base_name(func)} writes a tensor from outside"
                old = self.unknown(tensor)
            previous = program.nodes[old]
            if previous.leaf is not None or previous.reason in (UNKNOWN, MUTATED):
                program.writes = program.writes or f"{ops.base_name(func)} writes its {_leaf_name(previous)}"
                previous.recomputable, previous.reason = False, MUTATED
                previous.leaf = None
            recomputable = op.recomputable and not hidden
            node = ProgramNode(
                storage=previous.storage,
                storage_bytes=previous.storage_bytes,
                value=previous.value if not op.overwrites else self.target(tensor),
                device=tensor.device,
                producer=index,
                recomputable=recomputable,
                reason="" if recomputable else (op.reason or "writes in place"),
            )
            self._narrow(node, op, tensor)
            number = self._add(node, address)
            op.outputs.append((None, number))
            self.raw.discard(old)
            self._finish_node(number, op, tensor)
        for position, tensor in results:
            if self.is_known(tensor):
                continue
            address = self._see(tensor)
            raw = ops.is_uninitialised(func)
            node = ProgramNode(
                storage=len(self._storage_of) - 1,
                storage_bytes=tensor.untyped_storage().nbytes(),
                value=geometry(len(program.nodes), tensor),
                device=tensor.device,
                producer=index,
                recomputable=op.recomputable and position not in op.unwritten,
                reason=op.reason or ("may be left unwritten" if position in op.unwritten else ""),
            )
            if ops.is_constant(func) and tensor.numel() <= 1 and not op.inputs:
                node.recomputable = op.recomputable = True
                node.reason = op.reason = ""
            self._narrow(node, op, tensor)
            number = self._add(node, address)
            op.outputs.append((position, number))
            if raw:
                self.raw.add(number)
            else:
                self._finish_node(number, op, tensor)
        alive = sum(size for ref, size in self._sizes if not ref.expired())  # type: ignore[no-untyped-call, misc]
        program.peak_bytes = max(program.peak_bytes, alive)

    def constant(self, number: int, tensor: torch.Tensor) -> object:
        """What a number is that came from nowhere and is saved; ``None`` for every other tensor."""
        unknown = self.program.nodes[number].reason == UNKNOWN
        return tensor.item() if unknown and tensor.numel() == 1 and tensor.device.type == "cpu" else None

    def _finish_node(self, number: int, op: ProgramOp, tensor: torch.Tensor) -> None:
        """Hash it for NOTE [Invisible writers], and look whether it proves anything."""
        if not tensor.is_meta:
            self._hash[number] = fingerprint(tensor)
        node = self.program.nodes[number]
        if node.recomputable and tensor.numel() > 1 and all_equal(tensor):
            node.unproven = True
            node.recomputable, node.reason = False, "all its elements are equal, which proves nothing"
            op.recomputable, op.reason = False, node.reason

    def _narrow(self, node: ProgramNode, op: ProgramOp, tensor: torch.Tensor) -> None:
        """Lossless smaller forms, by construction: the dtype before an upcast, and dropout's 0-or-c masks."""
        name = ops.base_name(op.func)
        nodes = self.program.nodes
        if not covers(tensor):
            return
        if name == "_to_copy" and op.inputs and tensor.dtype.is_floating_point:
            source = nodes[op.inputs[0]].value.dtype
            if source.is_floating_point and source.itemsize < tensor.dtype.itemsize:
                if source is not torch.float16 or tensor.dtype in (torch.float32, torch.float64):
                    node.narrow_dtype = source
        elif name == "bernoulli_" and tensor.dtype.is_floating_point:
            node.mask_scale = 1.0
        elif (
            name in ("div_", "mul_") and op.inputs and nodes[op.inputs[0]].mask_scale is not None and len(op.args) == 2
        ):
            if isinstance(op.args[1], (int, float)):
                node.mask_scale = self._highest(tensor) if tensor.numel() else None
                if node.mask_scale == 0.0:
                    node.mask_scale = None

    def copy(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Of what an op is about to overwrite, to run it again from."""
        return tensor.clone()

    def _highest(self, tensor: torch.Tensor) -> float:
        return float(tensor.max())

    def run_foreign(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op that is not recorded, as tensors of unknown types are about: does it write what it was given?"""
        for tensor in ops.written(func, args, kwargs):
            address = address_of(local(tensor))
            number = self.current.get(address)
            node = self.program.nodes[number] if number is not None else None
            if address not in self._made and (node is None or node.producer is None):
                self.program.writes = self.program.writes or f"{ops.base_name(func)} writes a tensor from outside"
        out = func(*args, **kwargs)
        given = {address_of(local(t)) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        found = {address_of(local(t)) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        self._made |= found - given
        return out

    def add_leaf(self, leaf: Leaf, tensor: torch.Tensor) -> None:
        """A tensor that the block is given."""
        if type(tensor) not in self.plain or tensor.layout is not torch.strided:
            self.program.foreign = self.program.foreign or type(tensor).__name__
            return
        if self.is_known(tensor):
            return  # tied, or another view of the same storage
        address = self._see(tensor)
        node = ProgramNode(
            storage=len(self._storage_of) - 1,
            storage_bytes=tensor.untyped_storage().nbytes(),
            value=geometry(len(self.program.nodes), tensor),
            device=tensor.device,
            leaf=leaf,
            recomputable=True,
            requires_grad=tensor.requires_grad,
        )
        if leaf.kind != "input":
            self._sizes.pop()
        self._add(node, address)

    def unknown(self, tensor: torch.Tensor) -> int:
        """A tensor that came from nowhere: captured by a closure, made before the block."""
        address = self._see(tensor)
        self._sizes.pop()
        node = ProgramNode(
            storage=len(self._storage_of) - 1,
            storage_bytes=tensor.untyped_storage().nbytes(),
            value=geometry(len(self.program.nodes), tensor),
            device=tensor.device,
            reason=UNKNOWN,
        )
        return self._add(node, address)

    def _add(self, node: ProgramNode, address: int) -> int:
        number = len(self.program.nodes)
        node.value = node.value._replace(node=number)
        self.program.nodes.append(node)
        self.current[address] = number
        return number

    def _see(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._alive.append(weak)
        self._sizes.append((weak, storage.nbytes()))
        self._storage_of[storage._cdata] = len(self._storage_of)
        return int(storage._cdata)

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a node of its storage exists."""
        return address_of(tensor) in self.current

    def consume(self, tensor: torch.Tensor) -> int:
        """The node that ``tensor`` views now; a storage that changed behind our back becomes a boundary."""
        number = self.current.get(address_of(tensor))
        if number is None:
            return self.unknown(tensor)
        node = self.program.nodes[number]
        if number in self.raw:
            self.raw.discard(number)
            return self._boundary(number, tensor, "was filled by a kernel that torch does not see")
        expected = self._hash.get(number)
        shown = self._shown(tensor, node.value) if expected is not None else None
        if shown is not None and fingerprint(shown) != expected:
            return self._boundary(number, tensor, "was changed by a kernel that torch does not see")
        return number

    def _shown(self, tensor: torch.Tensor, value: Value) -> torch.Tensor | None:
        """What was hashed of a storage, if ``tensor`` shows just that, or if a kernel may have written a part of it."""
        if _same_geometry(tensor, value):
            return tensor
        if address_of(tensor) not in self._handed or tensor.dtype != value.dtype or tensor.is_conj() or tensor.is_neg():
            return None
        return tensor.as_strided(value.size, value.stride, value.offset)

    def hand_to_kernel(self, tensor: torch.Tensor) -> None:
        """A kernel is about to be given ``tensor``: hash what is in it, whoever made it. See `trace`."""
        address = address_of(tensor)
        if self.program.foreign or address not in self.current:
            return
        self._handed[address] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        if self.current[address] in self.raw:
            return
        number = self.consume(tensor)
        value = self.program.nodes[number].value
        if number not in self._hash and tensor.dtype == value.dtype:
            self._hash[number] = fingerprint(tensor.as_strided(value.size, value.stride, value.offset))

    def look_after_kernels(self) -> None:
        """The forward is over: what was written after the last op that could have shown it?"""
        for address, weak in self._handed.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
            if storage is not None and self.current[address] not in self.raw:
                value = self.program.nodes[self.current[address]].value
                whole = torch.empty(0, dtype=value.dtype, device=storage.device)
                self.consume(whole.set_(storage, value.offset, value.size, value.stride))

    def _boundary(self, number: int, tensor: torch.Tensor, reason: str) -> int:
        old = self.program.nodes[number]
        old.recomputable, old.reason = False, reason
        if number in self._hash and any(saved.value.node == number for saved in self.program.saved):
            old.reason = MUTATED  # what was saved is not what other ops have read
        if old.leaf is not None:
            self.program.writes = self.program.writes or f"a kernel writes its {_leaf_name(old)}"
            old.reason, old.leaf = MUTATED, None
        node = ProgramNode(
            storage=old.storage,
            storage_bytes=old.storage_bytes,
            value=old.value,
            device=old.device,
            producer=old.producer,
            reason=reason,
        )
        changed = self._add(node, address_of(tensor))
        if address_of(tensor) in self._handed and tensor.dtype == old.value.dtype:
            self._hash[changed] = fingerprint(tensor.as_strided(old.value.size, old.value.stride, old.value.offset))
        return changed

    def forbid(self, number: int, reason: str) -> None:
        """Recipes may not make this node."""
        node = self.program.nodes[number]
        node.recomputable, node.reason = False, reason

    def forbid_odd_views(self, results: list[tuple[int | None, torch.Tensor]]) -> None:
        """Views that change the dtype or carry a lazy conjugate are not derived by recipes."""
        for _, tensor in results:
            if self.is_odd(tensor):
                self.forbid(self.current[address_of(tensor)], "viewed under another dtype, or conjugated")

    def is_odd(self, tensor: torch.Tensor) -> bool:
        """Whether it shows its node under another dtype or lazily conjugated, as no `Value` says."""
        node = self.program.nodes[self.current[address_of(tensor)]]
        return tensor.dtype != node.value.dtype or tensor.is_conj() or tensor.is_neg()

    def target(self, tensor: torch.Tensor) -> Value:
        """The view that an op writes to."""
        return geometry(self.current[address_of(tensor)], tensor)


def address_of(tensor: torch.Tensor) -> int:
    """Of its storage; not used again while the recording holds on to it."""
    return int(tensor.untyped_storage()._cdata)


def is_small(buffer: torch.Tensor) -> bool:
    """Whether a buffer is copied into the frame: small, and a copy has its geometry."""
    return buffer.nbytes <= SMALL_BUFFER_BYTES and buffer.is_contiguous() and covers(buffer)


def covers(tensor: torch.Tensor) -> bool:
    """Whether it shows every byte of its storage once."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _same_geometry(tensor: torch.Tensor, value: Value) -> bool:
    return (
        tuple(tensor.size()) == value.size
        and tuple(tensor.stride()) == value.stride
        and tensor.storage_offset() == value.offset
        and tensor.dtype == value.dtype
    )


def _leaf_name(node: ProgramNode) -> str:
    if node.leaf is None:
        return "argument"
    return f"{node.leaf.kind} {node.leaf.name}".strip()


def geometry(node: int, tensor: torch.Tensor) -> Value:
    """The view of ``node`` that ``tensor`` shows."""
    offset: int = tensor.storage_offset()  # type: ignore[assignment]  # no SymInt here
    return Value(node, tuple(tensor.size()), tuple(tensor.stride()), offset, tensor.dtype)


def template_of(structure: Any, reads: dict[int, int]) -> Any:
    """Arguments of an op with a `Ref` for each tensor; ``reads`` has the nodes of those that it reads, by `id`."""
    if isinstance(structure, torch.Tensor):
        return Ref(geometry(reads.get(id(structure), -1), structure))
    if isinstance(structure, (list, tuple)):
        return tuple(template_of(item, reads) for item in structure)
    if isinstance(structure, dict):
        return {key: template_of(item, reads) for key, item in structure.items()}
    return structure


def results_of(result: Any) -> list[tuple[int | None, torch.Tensor]]:
    """The tensors that an op returned, each with its position; ``None`` where it is the result itself."""
    if isinstance(result, torch.Tensor):
        return [(None, result)]
    if isinstance(result, (tuple, list)):
        return [(i, t) for i, t in enumerate(result) if isinstance(t, torch.Tensor)]
    return []
