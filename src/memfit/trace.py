"""Record a block's program: run its real forward once, and write down what it does.

Below autograd a dispatch mode sees every aten op; saved-tensor hooks see every tensor that autograd keeps. Both write
into one list of events, so that "which version of this storage was saved" has an answer. Each op that a recipe may run
is run a second time on the spot, from the very tensors it read, and must give the same bits: by induction every recipe
over the program is right (design, rule 2). The second run is also what is timed.

NOTE [No proof by luck]: an op whose result has only equal elements (a gate that is still zero, LoRA's B) has proved
nothing. Such nodes are ``unproven`` and stay saved until a later recording sees them vary.

NOTE [Invisible writers]: a kernel that the dispatcher does not see (Triton, NumPy) may write into a storage between two
ops. Nodes are hashed when they are made and again whenever they are read; if the hash moved, the storage is a boundary.
"""

from __future__ import annotations

import random
import sys
import time
from hashlib import sha256
from types import FrameType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from memfit import ops
from memfit.bits import all_equal, fingerprint, same_bits
from memfit.programs import Leaf, Program, ProgramNode, ProgramOp, Ref, SavedTensor, TapeOp, TapeRef, Value

_READERS = ("tolist", "numpy", "__array__", "__dlpack__", "data_ptr")
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Write down the ops of one forward. Enter it, run the forward, leave it, then `finish`."""

    def __init__(self, leaves: list[tuple[Leaf, torch.Tensor]], owner: FrameType | None = None) -> None:
        """Start a recording.

        Args:
            leaves: The block's tensor inputs, parameters and buffers.
            owner: The Python frame of the block's call; ops outside it are not recorded (see NOTE [Stale modes]).
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.program = Program()
        self.leaves = leaves
        self._owner = owner
        self._current: dict[int, int] = {}  # storage address -> node
        self._alive: list[StorageWeakRef] = []  # keeps addresses from being used again
        self._storage_of: dict[int, int] = {}
        self._hash: dict[int, object] = {}
        self._raw: set[int] = set()  # nodes that nothing has written yet
        self._patches: list[tuple[str, Any]] = []
        self._events: list[tuple[Any, Any, int]] = []  # CUDA timing events
        self._sizes: list[tuple[StorageWeakRef, int]] = []
        self._packed_at_last_draw = 0
        self._generator_states: dict[torch.device, torch.Tensor] = {}
        self._constants: dict[int, Any] = {}
        self._taped: dict[Any, int] = {}
        self._num_taped = 0
        self._random_state: object = None
        self._reads = 0
        for leaf, tensor in leaves:
            self._add_leaf(leaf, tensor)

    # What the forward shows

    def __enter__(self) -> Recorder:
        self._random_state = _python_random_state()
        for device in {torch.device("cpu"), *(t.device for _, t in self.leaves if t.device.type in ("cpu", "cuda"))}:
            self._generator_states[device] = _generator(device).get_state()
        for name in _READERS:
            self._patches.append((name, _patch_reader(self, name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        self._unpatch()
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._owner = None  # a frame holds its callers' frames, and they hold the model's intermediate results
        self.program.python_random = _python_random_state() != self._random_state

    def _unpatch(self) -> None:
        while self._patches:
            name, original = self._patches.pop()
            if original is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, original)

    def note_read(self, what: str) -> None:
        """Python looked at data: the program depends on it."""
        if not self._reads and not self.program.data_dependent:
            self.program.data_dependent = what

    def is_stale(self) -> bool:
        """Whether the recorded call is over. See NOTE [Stale modes]."""
        # NOTE [Stale modes]: on KeyboardInterrupt no module hook runs, and a recorder would stay on the stack. So it
        # looks whether the call it belongs to is still running; `runtime` pops stale modes at the next entry and in
        # `remove`.
        if self._owner is None:
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self._owner:
                return False
            frame = frame.f_back
        return True

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_stale():
            return func(*args, **kwargs)
        self._reads += 1
        try:
            frame = sys._getframe(1)
            return self._record(func, args, kwargs, (id(frame), frame.f_lasti))
        finally:
            self._reads -= 1

    def pack(self, tensor: torch.Tensor) -> None:
        """Autograd keeps ``tensor`` (already detached)."""
        with torch._C._DisableTorchDispatch():
            self._pack(tensor)

    def _pack(self, tensor: torch.Tensor) -> None:
        self._reads += 1
        try:
            node = self._consume(tensor)
            value = self._value(tensor, node)
            constant = None
            if self.program.nodes[node].reason == _UNKNOWN and tensor.numel() == 1 and tensor.device.type == "cpu":
                constant = tensor.item()
            saved = SavedTensor(
                value, tensor.device, tensor._version, self.program.nodes[node].leaf is not None, constant
            )
            if value.dtype != self.program.nodes[node].value.dtype or tensor.is_conj() or tensor.is_neg():
                self._forbid(node, "saved under another dtype, or conjugated")
            self.program.saved.append(saved)
        finally:
            self._reads -= 1

    # One op

    def _record(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], site: Any) -> Any:
        started = time.perf_counter()
        program = self.program
        tensors = _tensors((args, kwargs))
        for tensor in tensors:
            if type(tensor) not in _PLAIN_TYPES or tensor.layout is not torch.strided:
                program.foreign = program.foreign or type(tensor).__name__
        if program.foreign:
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and not program.data_dependent:
            program.data_dependent = "item()"
        if (
            torch.Tag.dynamic_output_shape in func.tags
            and not program.data_dependent
            and not _indexes_by_integers(func, args)
        ):
            program.data_dependent = func._schema.name
        written = ops.written(func, args, kwargs)
        written_ids = {id(t) for t in written}
        overwrites = ops.is_overwriting(func) and len(written) == 1 and _covers(written[0])
        hidden = ops.is_training_batch_norm(func, args)
        skipped = written_ids if overwrites else set()
        if hidden:
            skipped = skipped | {id(args[3]), id(args[4])}
        reads = {id(t): self._consume(t) for t in tensors if id(t) not in skipped}
        device = next((t.device for t in tensors), kwargs.get("device") or torch.device("cpu"))
        device = torch.device(device) if not isinstance(device, torch.device) else device
        allowed = ops.is_recomputable(func, args, kwargs, device.type)
        drawn = ops.is_random(func, args, kwargs)
        state = _generator(device).get_state() if drawn else None
        versions = [] if allowed else [t._version for t in tensors]
        inplace = bool(written) and not hidden
        template, template_kwargs = _template(args, reads, self), _template(kwargs, reads, self)
        before = None
        if allowed and inplace and len(written) == 1:
            before = None if overwrites else written[0].clone()
        program.record_seconds += time.perf_counter() - started

        tape_args, tape_kwargs = self._tape(args), self._tape(kwargs)
        out = func(*args, **kwargs)

        started = time.perf_counter()
        self._tape_results(func, tape_args, tape_kwargs, out)
        if not allowed:
            written += [
                t for t, v in zip(tensors, versions, strict=True) if t._version != v and id(t) not in written_ids
            ]
        results = _outputs(out)
        if not written and all(self._is_known(t) for _, t in results) and not drawn:
            self._forbid_odd_views(results, tensors)
            return out  # a view, or an op that returned what it got
        op = ProgramOp(func, (), {}, (), [], random=drawn)
        index = len(program.ops)
        program.ops.append(op)
        op.args, op.kwargs = template, template_kwargs
        op.inputs = tuple(dict.fromkeys(reads.values()))
        op.recomputable, op.reason = self._may_recompute(func, op, allowed, written, hidden, site)
        if drawn and state is not None:
            self._mark_random(index, op, state, device)
        if inplace and len(written) == 1:
            op.target = self._target(written[0])
            op.overwrites = overwrites
            positions = [i for i, a in enumerate(args) if a is written[0]]
            op.target_at = positions[0] if positions else 0
            if len(positions) != 1:
                op.recomputable, op.reason = False, "writes an argument that it also reads"
        verified = True
        if op.recomputable:
            verified = self._verify(op, func, args, kwargs, out, before, written, state, device, overwrites)
            if not verified:
                op.recomputable, op.reason = False, "a second run gave other bits"
        self._new_nodes(index, op, func, results, written, hidden)
        if ops.is_constant(func) and not written:
            self._constants.update({node: site for _, node in op.outputs})
        program.record_seconds += time.perf_counter() - started
        return out

    def _tape(self, structure: Any) -> Any:
        if isinstance(structure, torch.Tensor):
            return TapeRef(self._tape_number(structure))
        if isinstance(structure, (list, tuple)):
            return [self._tape(item) for item in structure]
        if isinstance(structure, dict):
            return {key: self._tape(item) for key, item in structure.items()}
        return structure

    def _tape_number(self, tensor: torch.Tensor) -> int:
        """Tensors on the tape are known by what they view: autograd hands on aliases, not objects."""
        key = (_address(tensor), tuple(tensor.size()), tensor.stride(), tensor.storage_offset(), tensor.dtype)
        number = self._taped.get(key)
        if number is None:
            number = self._taped[key] = self._num_taped
            self._num_taped += 1
            node = self._current.get(key[0])
            if node is None:
                node = self._unknown(tensor)
            self.program.tape_leaves.append((number, self._geometry(node, tensor)))
        return number

    def _tape_results(self, func: OpOverload, args: Any, kwargs: Any, out: Any) -> None:
        if func is torch.ops.aten.detach.default:
            return
        numbers: list[int | None] = []
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, torch.Tensor):
                numbers.append(None)
                continue
            key = (_address(tensor), tuple(tensor.size()), tensor.stride(), tensor.storage_offset(), tensor.dtype)
            self._taped[key] = self._num_taped
            numbers.append(self._num_taped)
            self._num_taped += 1
        self.program.tape.append(TapeOp(func, args, kwargs, tuple(numbers)))

    def _may_recompute(
        self, func: OpOverload, op: ProgramOp, allowed: bool, written: list[torch.Tensor], hidden: bool, site: Any
    ) -> tuple[bool, str]:
        """Whether recipes may run the op, before it is verified; and why not."""
        nodes = self.program.nodes
        if not allowed:
            return False, f"{ops.base_name(func)} is a boundary"
        if ops.is_uninitialised(func) or ops.is_constant(func):
            return False, "a factory that something may fill later"
        for node in op.inputs:
            if self._constants.get(node) == site:
                self._trust_constant(node)
            if node in self._raw:
                return False, "reads memory that nothing wrote"
            if not nodes[node].recomputable and nodes[node].leaf is None and nodes[node].producer is None:
                return False, nodes[node].reason or _UNKNOWN
        if written and not hidden:
            if len(written) != 1:
                return False, "writes several tensors"
            current = self._current.get(_address(written[0]))
            if current is None or nodes[current].leaf is not None or nodes[current].reason == _UNKNOWN:
                return False, "writes a tensor that it did not make"
            if any(saved.value.node == current for saved in self.program.saved):
                return False, "overwrites a saved tensor"
        return True, ""

    def _trust_constant(self, number: int) -> None:
        """A constant that the same C++ call makes and reads: no kernel of Python's can come in between."""
        node = self.program.nodes[number]
        assert node.producer is not None
        node.recomputable, node.reason = True, ""
        op = self.program.ops[node.producer]
        op.recomputable, op.reason = True, ""

    def _verify(
        self,
        op: ProgramOp,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        before: torch.Tensor | None,
        written: list[torch.Tensor],
        state: torch.Tensor | None,
        device: torch.device,
        overwrites: bool,
    ) -> bool:
        """Run the op again from what it read; see rule 2 of the design. Times it on the way."""
        again_func, again_args, again_kwargs = ops.purify(func, args, kwargs)
        op.func = again_func
        if again_func is not func or again_args is not args:
            op.args = ops.purify(func, op.args, op.kwargs)[1]
        target = None
        if op.target is not None:
            target = torch.empty_strided(written[0].size(), written[0].stride(), dtype=written[0].dtype, device=device)
            if not overwrites and before is not None:
                if before.stride() != written[0].stride():
                    return False
                target = before
            again_args = tuple(target if a is written[0] else a for a in args)
            again_kwargs = {k: target if v is written[0] else v for k, v in kwargs.items()}
        after = None
        if state is not None:
            generator = _generator(device)
            after = generator.get_state()
            generator.set_state(state)
        started = time.perf_counter()
        events = self._start_events(device)
        again = again_func(*again_args, **again_kwargs)
        op.seconds = time.perf_counter() - started
        if events is not None:
            events[1].record()
            self._events.append((events[0], events[1], len(self.program.ops) - 1))
        if state is not None and after is not None:
            if not torch.equal(_generator(device).get_state(), after):
                _generator(device).set_state(after)
                return False
        if target is not None:
            return same_bits(target, written[0])
        first, second = [t for _, t in _outputs(out)], [t for _, t in _outputs(again)]
        if len(first) != len(second):
            return False
        if not all(same_bits(a, b) for a, b in zip(first, second, strict=True)):
            return False
        started = time.perf_counter()
        if op.seconds < 2e-4 and not op.random and device.type == "cpu" and op.target is None:
            again_func(*again_args, **again_kwargs)  # tiny ops: the second of two is less noisy
            op.seconds = min(op.seconds, time.perf_counter() - started)
        return True

    def _start_events(self, device: torch.device) -> tuple[Any, Any] | None:
        if device.type != "cuda":
            return None
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        return start, end

    def _mark_random(self, index: int, op: ProgramOp, state: torch.Tensor, device: torch.device) -> None:
        """Find where a run can take the generator's state: at entry, or at a pack since the random op before."""
        packed = len(self.program.saved)
        earlier = [o for o in self.program.ops[:index] if o.random]
        if not earlier:
            op.snapshot = 0
        elif packed > (self._packed_at_last_draw):
            op.snapshot = packed
        else:
            op.recomputable, op.reason = False, "draws right after another random op"
        self._packed_at_last_draw = packed
        expected = self._generator_states.get(device)
        if expected is not None and not torch.equal(expected, state):
            op.recomputable, op.reason = False, "something else moved the generator"
        self._generator_states[device] = _generator(device).get_state()

    # Nodes

    def _new_nodes(
        self,
        index: int,
        op: ProgramOp,
        func: OpOverload,
        results: list[tuple[int | None, torch.Tensor]],
        written: list[torch.Tensor],
        hidden: bool,
    ) -> None:
        program = self.program
        for tensor in written:
            address = _address(tensor)
            old = self._current.get(address)
            if old is None:
                program.writes = program.writes or f"{ops.base_name(func)} writes a tensor from outside"
                old = self._unknown(tensor)
            previous = program.nodes[old]
            if previous.leaf is not None or previous.reason in (_UNKNOWN, _MUTATED):
                program.writes = program.writes or f"{ops.base_name(func)} writes its {_leaf_name(previous)}"
                previous.recomputable, previous.reason = False, _MUTATED
                previous.leaf = None
            recomputable = op.recomputable and not hidden
            node = ProgramNode(
                storage=previous.storage,
                storage_bytes=previous.storage_bytes,
                value=previous.value if not op.overwrites else self._target(tensor),
                device=tensor.device,
                producer=index,
                recomputable=recomputable,
                reason="" if recomputable else (op.reason or "writes in place"),
            )
            self._narrow(node, op, tensor)
            number = self._add(node, address)
            op.outputs.append((None, number))
            self._raw.discard(old)
            self._finish_node(number, op, tensor)
        for position, tensor in results:
            if self._is_known(tensor):
                continue
            address = self._see(tensor)
            raw = ops.is_uninitialised(func)
            node = ProgramNode(
                storage=len(self._storage_of) - 1,
                storage_bytes=tensor.untyped_storage().nbytes(),
                value=self._geometry(len(program.nodes), tensor),
                device=tensor.device,
                producer=index,
                recomputable=op.recomputable,
                reason=op.reason,
            )
            if ops.is_constant(func) and tensor.numel() <= 1 and not op.inputs:
                node.recomputable = op.recomputable = True
                node.reason = op.reason = ""
            self._narrow(node, op, tensor)
            number = self._add(node, address)
            op.outputs.append((position, number))
            if raw:
                self._raw.add(number)
            else:
                self._finish_node(number, op, tensor)
        alive = sum(size for ref, size in self._sizes if not ref.expired())  # type: ignore[no-untyped-call, misc]
        program.peak_bytes = max(program.peak_bytes, alive)

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
        if not _covers(tensor):
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
                node.mask_scale = float(tensor.max()) if tensor.numel() else None
                if node.mask_scale == 0.0:
                    node.mask_scale = None

    def _add_leaf(self, leaf: Leaf, tensor: torch.Tensor) -> None:
        if type(tensor) not in _PLAIN_TYPES or tensor.layout is not torch.strided:
            self.program.foreign = self.program.foreign or type(tensor).__name__
            return
        if self._is_known(tensor):
            return  # tied, or another view of the same storage
        address = self._see(tensor)
        node = ProgramNode(
            storage=len(self._storage_of) - 1,
            storage_bytes=tensor.untyped_storage().nbytes(),
            value=self._geometry(len(self.program.nodes), tensor),
            device=tensor.device,
            leaf=leaf,
            recomputable=True,
            requires_grad=tensor.requires_grad,
        )
        if leaf.kind != "input":
            self._sizes.pop()
        self._add(node, address)

    def _unknown(self, tensor: torch.Tensor) -> int:
        """A tensor that came from nowhere: captured by a closure, made before the block."""
        address = self._see(tensor)
        self._sizes.pop()
        node = ProgramNode(
            storage=len(self._storage_of) - 1,
            storage_bytes=tensor.untyped_storage().nbytes(),
            value=self._geometry(len(self.program.nodes), tensor),
            device=tensor.device,
            reason=_UNKNOWN,
        )
        return self._add(node, address)

    def _add(self, node: ProgramNode, address: int) -> int:
        number = len(self.program.nodes)
        node.value = node.value._replace(node=number)
        self.program.nodes.append(node)
        self._current[address] = number
        return number

    def _see(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._alive.append(weak)
        self._sizes.append((weak, storage.nbytes()))
        self._storage_of[storage._cdata] = len(self._storage_of)
        return int(storage._cdata)

    def _is_known(self, tensor: torch.Tensor) -> bool:
        return _address(tensor) in self._current

    def _consume(self, tensor: torch.Tensor) -> int:
        """The node that ``tensor`` views now; a storage that changed behind our back becomes a boundary."""
        number = self._current.get(_address(tensor))
        if number is None:
            return self._unknown(tensor)
        node = self.program.nodes[number]
        if number in self._raw:
            self._raw.discard(number)
            return self._boundary(number, tensor, "was filled by a kernel that torch does not see")
        expected = self._hash.get(number)
        if expected is not None and _same_geometry(tensor, node.value) and fingerprint(tensor) != expected:
            return self._boundary(number, tensor, "was changed by a kernel that torch does not see")
        return number

    def _boundary(self, number: int, tensor: torch.Tensor, reason: str) -> int:
        old = self.program.nodes[number]
        old.recomputable, old.reason = False, reason
        node = ProgramNode(
            storage=old.storage,
            storage_bytes=old.storage_bytes,
            value=old.value,
            device=old.device,
            producer=old.producer,
            reason=reason,
        )
        return self._add(node, _address(tensor))

    def _forbid(self, number: int, reason: str) -> None:
        node = self.program.nodes[number]
        node.recomputable, node.reason = False, reason

    def _forbid_odd_views(self, results: list[tuple[int | None, torch.Tensor]], tensors: list[torch.Tensor]) -> None:
        """Views that change the dtype or carry a lazy conjugate are not derived by recipes."""
        for _, tensor in results:
            number = self._current[_address(tensor)]
            if tensor.dtype != self.program.nodes[number].value.dtype or tensor.is_conj() or tensor.is_neg():
                self._forbid(number, "viewed under another dtype, or conjugated")

    def _geometry(self, node: int, tensor: torch.Tensor) -> Value:
        offset: int = tensor.storage_offset()  # type: ignore[assignment]  # no SymInt here
        return Value(node, tuple(tensor.size()), tuple(tensor.stride()), offset, tensor.dtype)

    def _value(self, tensor: torch.Tensor, node: int) -> Value:
        return self._geometry(node, tensor)

    def _target(self, tensor: torch.Tensor) -> Value:
        return self._geometry(self._current[_address(tensor)], tensor)

    # The end

    def finish(self, outputs: list[torch.Tensor], graph: tuple[object, ...], custom: set[int]) -> Program:
        """Close the recording.

        Args:
            outputs: Tensors that the block returned.
            graph: Fingerprint of the autograd graph between outputs and inputs.
            custom: Indices of saved tensors that belong to custom autograd Functions.
        """
        program = self.program
        for start, end, index in self._events:
            end.synchronize()
            program.ops[index].seconds = start.elapsed_time(end) * 1e-3
        if not program.foreign:
            for tensor in outputs:
                if type(tensor) not in _PLAIN_TYPES:
                    program.foreign = type(tensor).__name__
                    break
                number = self._consume(tensor)
                program.nodes[number].output = True
                program.outputs.append(self._value(tensor, number))
                program.tape_outputs.append(self._tape_number(tensor))
        for index in custom:
            program.nodes[program.saved[index].value.node].custom = True
        program.graph = graph
        _propagate(program)
        program.key = _key(program)
        return program


_UNKNOWN = "a tensor of unknown origin"
_DOWNSTREAM = "reads a value that cannot come back: "
_MUTATED = "the block writes it in place"


def _propagate(program: Program) -> None:
    """What depends on a value that is neither saved nor recomputable is not recomputable either."""
    saved = {s.value.node for s in program.saved}
    for op in program.ops:
        for number in op.inputs:
            source = program.nodes[number]
            available = source.recomputable or (number in saved and not source.custom and source.reason != _MUTATED)
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
    """Equal for equal programs, on every machine."""
    digest = sha256()
    for node in program.nodes:
        digest.update(repr((node.storage, node.storage_bytes, node.value, str(node.device), node.leaf)).encode())
    for op in program.ops:
        digest.update(repr((str(op.func), op.args, op.kwargs, op.outputs, op.target, op.random, op.snapshot)).encode())
    digest.update(repr([(s.value, s.version) for s in program.saved]).encode())
    digest.update(repr((program.outputs, program.graph)).encode())
    return digest.hexdigest()[:16]


def _template(structure: Any, reads: dict[int, int], recorder: Recorder) -> Any:
    if isinstance(structure, torch.Tensor):
        node = reads.get(id(structure), -1)
        return Ref(recorder._geometry(node, structure))
    if isinstance(structure, (list, tuple)):
        return tuple(_template(item, reads, recorder) for item in structure)
    if isinstance(structure, dict):
        return {key: _template(item, reads, recorder) for key, item in structure.items()}
    return structure


def _tensors(structure: Any) -> list[torch.Tensor]:
    if isinstance(structure, torch.Tensor):
        return [structure]
    if isinstance(structure, (list, tuple)):
        return [t for item in structure for t in _tensors(item)]
    if isinstance(structure, dict):
        return [t for item in structure.values() for t in _tensors(item)]
    return []


def _outputs(result: Any) -> list[tuple[int | None, torch.Tensor]]:
    if isinstance(result, torch.Tensor):
        return [(None, result)]
    if isinstance(result, (tuple, list)):
        return [(i, t) for i, t in enumerate(result) if isinstance(t, torch.Tensor)]
    return []


def _indexes_by_integers(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """``index`` is tagged as data-dependent for the sake of masks; with integers its shape is that of its arguments."""
    if ops.base_name(func) != "index":
        return False
    return all(t.dtype not in (torch.bool, torch.uint8) for t in _tensors(args[1:]))


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _covers(tensor: torch.Tensor) -> bool:
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


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def _python_random_state() -> tuple[object, object]:
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    return random.getstate(), None if state is None else (state[0], state[1].tobytes(), *state[2:])


def _patch_reader(recorder: Recorder, name: str) -> Any:
    """Replace a method by which Python reads data past the dispatcher; returns what stood in its place, if anything."""
    before = torch.Tensor.__dict__.get(name)
    original = getattr(torch.Tensor, name)

    def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder.note_read(f"{name}()" if not name.startswith("__") else name)
        return original(self, *args, **kwargs)

    setattr(torch.Tensor, name, read)
    return before
