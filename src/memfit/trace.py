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

import sys
import time
from types import FrameType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from memfit import flops, ops
from memfit.bits import same_bits
from memfit.checkpoints import is_inside
from memfit.costs import Stopwatch, warm_seconds
from memfit.host import memory_ran_out
from memfit.programs import UNEQUAL, UNKNOWN, Leaf, Program, ProgramOp, SavedTensor, seal
from memfit.readers import patch_readers, python_random_state, restore_readers
from memfit.replay import generator_of
from memfit.signature import tensors_in
from memfit.storages import Storages, address_of, covers, geometry, results_of, template_of
from memfit.streams import Stream
from memfit.tape import Tape


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Write down the ops of one forward. Enter it, run the forward, leave it, then `finish`."""

    make_storages = Storages
    shows_flops = True

    def __init__(
        self,
        leaves: list[tuple[Leaf, torch.Tensor]],
        owner: FrameType | None = None,
        stream: Stream | None = None,
    ) -> None:
        """Start a recording.

        Args:
            leaves: The block's tensor inputs, parameters and buffers.
            owner: The Python frame of the block's call; ops outside it are not recorded (see NOTE [Stale modes]).
            stream: That the block was called on; it is asked to look at every op that may need a gradient.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.program = Program()
        self._nodes = self.make_storages(self.program)
        self._tape = Tape(self.program, self._nodes)
        self.leaves = leaves
        self.checkpoints = False  # whether the block calls torch's checkpoint itself
        self.resets: list[torch.Tensor] = []  # what was set to itself, in order
        self._owner = owner
        self._stream = stream
        self._patches: list[tuple[str, Any]] = []
        self._watches: list[tuple[Stopwatch, int]] = []  # of ops on CUDA
        self._packed_at_last_draw = 0
        self._generator_states: dict[torch.device, torch.Tensor] = {}
        self._constants: dict[int, Any] = {}
        self._random_state: object = None
        self._reads = 0
        for leaf, tensor in leaves:
            self._nodes.add_leaf(leaf, tensor)

    # What the forward shows

    def __enter__(self) -> Recorder:
        self._random_state = python_random_state()
        for device in {torch.device("cpu"), *(tensor.device for _, tensor in self.leaves)}:
            self._generator_states[device] = generator_of(device).get_state()
        self._patches = patch_readers(self.note_read, self.note_launch)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        restore_readers(self._patches)
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self.leaves, self._owner = [], None  # a frame holds its callers' frames, and they hold what is computed
        self.program.python_random = python_random_state() != self._random_state

    def note_read(self, what: str) -> None:
        """Python looked at data: the program depends on it."""
        if not self._reads and not self.program.data_dependent:
            self.program.data_dependent = what

    def note_launch(self, tensor: torch.Tensor) -> None:
        """A kernel that the dispatcher does not see is about to be given ``tensor``."""
        self._reads += 1
        try:
            with torch._C._DisableTorchDispatch():
                self._nodes.hand_to_kernel(tensor.detach())
        finally:
            self._reads -= 1

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
        if self._stream is not None and torch.is_grad_enabled():
            self._stream.look()  # FSDP gathers weights on streams of its own, without gradients
        if ops.changes_nothing(func, args):
            self.resets.append(args[0])
            return func(*args, **kwargs)
        self._reads += 1
        self.checkpoints = self.checkpoints or is_inside()
        try:
            frame = sys._getframe(1)
            return self._record(func, args, kwargs, (id(frame), frame.f_lasti))
        finally:
            self._reads -= 1

    def pack(self, tensor: torch.Tensor) -> None:
        """Autograd keeps ``tensor`` (already detached)."""
        if type(tensor) not in self._nodes.plain:
            self.program.foreign = self.program.foreign or type(tensor).__name__
        if not self.program.foreign:
            with torch._C._DisableTorchDispatch():
                self._pack(tensor)

    def _pack(self, tensor: torch.Tensor) -> None:
        self._reads += 1
        try:
            node = self._nodes.consume(tensor)
            value = geometry(node, tensor)
            leaf = self.program.nodes[node].leaf is not None
            saved = SavedTensor(value, tensor.device, tensor._version, leaf, self._nodes.constant(node, tensor))
            if self._nodes.is_odd(tensor):
                self._nodes.forbid(node, "saved under another dtype, or conjugated")
            self.program.saved.append(saved)
        finally:
            self._reads -= 1

    # One op

    def _record(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], site: Any) -> Any:
        started = time.perf_counter()
        program = self.program
        tensors = tensors_in((args, kwargs))
        for tensor in tensors:
            if type(tensor) not in self._nodes.plain or tensor.layout is not torch.strided:
                program.foreign = program.foreign or type(tensor).__name__
        if program.foreign:
            return self._nodes.run_foreign(func, args, kwargs)
        if torch.Tag.data_dependent_output in func.tags and not program.data_dependent:
            program.data_dependent = "item()" if ops.base_name(func) == "_local_scalar_dense" else ops.base_name(func)
        if (
            torch.Tag.dynamic_output_shape in func.tags
            and not program.data_dependent
            and not ops.indexes_by_integers(func, args)
        ):
            program.data_dependent = func._schema.name
        written = ops.written(func, args, kwargs)
        written_ids = {id(t) for t in written}
        overwrites = ops.is_overwriting(func) and len(written) == 1 and covers(written[0])
        hidden = ops.is_training_batch_norm(func, args)
        skipped = written_ids if overwrites else set()
        if hidden:
            skipped = skipped | {id(args[3]), id(args[4])}
        reads = {id(t): self._nodes.consume(t) for t in tensors if id(t) not in skipped}
        device = torch.device(next((t.device for t in tensors), kwargs.get("device") or torch.device("cpu")))
        odd = any(self._nodes.is_odd(t) for t in tensors if id(t) in reads)
        allowed = not odd and ops.is_recomputable(func, args, kwargs, device.type)
        allowed = allowed and not ops.crosses_devices(tensors, kwargs)
        drawn = ops.is_random(func, args, kwargs)
        state = self._generator_state(device) if drawn else None
        versions = [] if allowed else [t._version for t in tensors]
        inplace = bool(written) and not hidden
        template, template_kwargs = template_of(args, reads), template_of(kwargs, reads)
        before = None
        if allowed and inplace and len(written) == 1:
            before = None if overwrites else self._nodes.copy(written[0])
        program.record_seconds += time.perf_counter() - started

        tape_args, tape_kwargs = self._tape.references(args), self._tape.references(kwargs)
        watch = None if allowed else self._watch(device)
        out = func(*args, **kwargs)
        if watch is not None:
            watch.stop()

        started = time.perf_counter()
        if (counter := flops.current()) is not None:
            counter.see(func, args, kwargs, out)
        self._tape.note(func, tape_args, tape_kwargs, out)
        if not allowed:
            written += [
                t for t, v in zip(tensors, versions, strict=True) if t._version != v and id(t) not in written_ids
            ]
        results = results_of(out)
        if not written and all(self._nodes.is_known(t) for _, t in results) and not drawn:
            self._nodes.forbid_odd_views(results)
            return out  # a view, or an op that returned what it got
        inputs = tuple(dict.fromkeys(reads.values()))
        unwritten = ops.unwritten(func, args, kwargs)
        op = ProgramOp(func, template, template_kwargs, inputs, [], unwritten=unwritten, random=drawn)
        index = len(program.ops)
        program.ops.append(op)
        if watch is not None:
            self._watches.append((watch, index))
        op.recomputable, op.reason = self._may_recompute(func, op, allowed, written, hidden, site)
        if drawn:
            self._mark_random(index, op, state, device)
        if inplace and len(written) == 1:
            op.target = self._nodes.target(written[0])
            op.overwrites = overwrites
            positions = [i for i, a in enumerate(args) if a is written[0]]
            op.target_at = positions[0] if positions else 0
            if len(positions) != 1:
                op.recomputable, op.reason = False, "writes an argument that it also reads"
        verified: bool | None = True
        if op.recomputable:
            verified = self._verify(op, func, args, kwargs, out, before, written, state, device, overwrites)
            if not verified:
                op.recomputable, op.reason = False, UNEQUAL
        self._nodes.new_nodes(index, op, func, results, written, hidden)
        if verified is None:  # another recording may have room
            for _, node in op.outputs:
                program.nodes[node].unproven = True
        if ops.is_constant(func) and not written:
            self._constants.update({node: site for _, node in op.outputs})
        program.record_seconds += time.perf_counter() - started
        return out

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
            if node in self._nodes.raw:
                return False, "reads memory that nothing wrote"
            if not nodes[node].recomputable and nodes[node].leaf is None and nodes[node].producer is None:
                return False, nodes[node].reason or UNKNOWN
        if written and not hidden:
            if len(written) != 1:
                return False, "writes several tensors"
            current = self._nodes.current.get(address_of(written[0]))
            if current is None or nodes[current].leaf is not None or nodes[current].reason == UNKNOWN:
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
    ) -> bool | None:
        """Run the op again from what it read; see rule 2 of the design. Times it on the way. ``None``: no room."""
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
            generator = generator_of(device)
            after = generator.get_state()
            generator.set_state(state)
        started = time.perf_counter()
        watch = self._watch(device)
        try:
            again = again_func(*again_args, **again_kwargs)
        except Exception as error:
            if state is not None and after is not None:
                generator_of(device).set_state(after)
            if not memory_ran_out(error):
                raise
            return None
        op.seconds = time.perf_counter() - started
        if watch is not None:
            watch.stop()
            self._watches.append((watch, len(self.program.ops) - 1))
        if state is not None and after is not None:
            if not torch.equal(generator_of(device).get_state(), after):
                generator_of(device).set_state(after)
                return False
        if target is not None:
            return same_bits(target, written[0])
        first, second = ([t for i, t in results_of(each) if i not in op.unwritten] for each in (out, again))
        if len(first) != len(second) or not all(same_bits(a, b) for a, b in zip(first, second, strict=True)):
            return False
        del again, second  # the memory that this run has touched serves the next
        if not op.random and device.type == "cpu":
            op.seconds = warm_seconds(op.seconds, lambda: again_func(*again_args, **again_kwargs))
        elif not op.random and watch is not None:
            watch.again(lambda: again_func(*again_args, **again_kwargs))
        return True

    def _watch(self, device: torch.device) -> Stopwatch | None:
        return Stopwatch(device) if device.type == "cuda" else None

    def _generator_state(self, device: torch.device) -> torch.Tensor | None:
        return generator_of(device).get_state()

    def _mark_random(self, index: int, op: ProgramOp, state: torch.Tensor | None, device: torch.device) -> None:
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
        if state is None:
            return
        expected = self._generator_states.get(device)
        if expected is not None and not torch.equal(expected, state):
            op.recomputable, op.reason = False, "something else moved the generator"
        self._generator_states[device] = generator_of(device).get_state()

    # The end

    def finish(self, outputs: list[torch.Tensor], graph: tuple[object, ...], custom: set[int]) -> Program:
        """Close the recording.

        Args:
            outputs: Tensors that the block returned.
            graph: Fingerprint of the autograd graph between outputs and inputs.
            custom: Indices of saved tensors that belong to custom autograd Functions.
        """
        program = self.program
        for watch, index in self._watches:
            program.ops[index].seconds = watch.seconds
            program.forward_seconds += watch.seconds
        if not program.foreign:
            self._nodes.look_after_kernels()
            for tensor in outputs:
                if type(tensor) not in self._nodes.plain:
                    program.foreign = type(tensor).__name__
                    break
                number = self._nodes.consume(tensor)
                program.nodes[number].output = True
                program.outputs.append(geometry(number, tensor))
                program.tape_outputs.append(self._tape.number(tensor))
        for index in custom:
            program.nodes[program.saved[index].value.node].custom = True
        program.graph = graph
        seal(program)
        return program
