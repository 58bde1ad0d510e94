"""Apply policies to an unchanged model: two hooks on each block, and saved-tensor hooks while it runs.

A `Runtime` belongs to one model. The pre-forward hook of a block finds the recording for the call's signature, or
starts one; while the forward runs, the pack hook only parks. The post-forward hook compares the call with its recording
and only then drops what the policy recomputes (late drop, rule 1). On any difference the call keeps everything, and the
block is recorded again.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from memfit import checkpoints, graph
from memfit.blocks import UNSTEADY, Block
from memfit.calls import Call
from memfit.canary import Turns
from memfit.entries import Entry, ProgramState, recorded_alike, remember, state_of
from memfit.errors import RecomputeError
from memfit.fallback import ReplayOfModule, replaying
from memfit.frames import Frame, Kept
from memfit.holders import Holders
from memfit.hooks import BackwardHook, Listener, PostHook, PreHook, RootHook
from memfit.inputs import Inputs
from memfit.keeper import Keeper
from memfit.links import Links
from memfit.parking import park, park_and_snapshot
from memfit.partitioned import WHOLE, only_reads
from memfit.passes import forget_failed_passes
from memfit.plans import Policy
from memfit.programs import Program
from memfit.replay import CompiledPolicy
from memfit.signature import numeric_flags, parameter_slots, read_arguments, tensors_in
from memfit.streams import SEVERAL, Streams
from memfit.surroundings import why_aside
from memfit.trace import Recorder
from memfit.verification import verify

VERIFIED_CALLS = 3
GRAPH_CHECKED_CALLS = 8
GRAPH_CHECK_PERIOD = 16
MAX_RECORDINGS_IN_A_ROW = 32
RECORDING_FORWARDS = 5  # what a recording costs, in forwards of the block


class Runtime:
    """The hooks of one fitted model."""

    def __init__(self, model: torch.nn.Module, blocks: Iterable[tuple[str, torch.nn.Module]]) -> None:
        """Install hooks on ``blocks``; every call keeps everything until `choose` says otherwise."""
        self.blocks: list[Block] = []
        self.states: dict[str, ProgramState] = {}
        self.calls: list[Call] = []  # of the step so far
        self.choose: Callable[[ProgramState, int, str], Policy | None] = lambda state, index, name: None
        self.listener: Listener | None = None
        self.step_began: Callable[[], None] = lambda: None
        self.first_called: Callable[[Call, Entry | None], None] = lambda call, entry: None
        self.has_room: Callable[[int], bool] = lambda index: True
        self.defer: Callable[[RecomputeError], bool] | None = None
        self.keeper = Keeper()
        self.backward_seen = False
        self.begun = False
        self._first_frame: weakref.ref[Frame | ReplayOfModule | Kept] | None = None
        self.active = True
        self.whole = False  # blocks that ZeRO-3 has partitioned run again as a whole
        self.home: torch.device | None = None  # of the blocks, where a model has several
        self.generation = 0
        self.steps = 0  # begun so far
        self.notes: dict[str, str] = {}
        self.recorded, self.record_seconds = 0, 0.0
        self._num_calls = self._step_recordings = 0  # block calls of the last step, recordings of this one
        self._turns = Turns()
        self._local = threading.local()
        self.links = Links(self.note, self._written)
        self.streams = Streams()
        self.model = weakref.ref(model)
        self._root_hooks = [model.register_forward_pre_hook(RootHook(self))]
        for name, module in blocks:
            self.add_block(name, module)

    # Installing and removing

    def add_block(self, name: str, module: torch.nn.Module, parent: str = "", at: int | None = None) -> Block:
        """Hook one more block."""
        block = Block(name=name, module=module, parent=parent, above=self._above(name))
        block.slots = parameter_slots(module)
        block.hooks = [
            module.register_forward_pre_hook(PreHook(self, block), with_kwargs=True),
            module.register_forward_hook(PostHook(self, block), with_kwargs=True, always_call=True, prepend=True),
        ]
        self.blocks.insert(len(self.blocks) if at is None else at, block)
        return block

    def _above(self, name: str) -> list[weakref.ref[torch.nn.Module]]:
        model = self.model()
        assert model is not None
        parts = name.split(".")
        return [weakref.ref(model.get_submodule(".".join(parts[:depth]))) for depth in range(len(parts))]

    def remove(self) -> None:
        """Take every hook off; frames that are still alive go on working."""
        self.active = False
        self.pop_stale()
        for hook in self._root_hooks:
            hook.remove()
        for block in self.blocks:
            block.unhook()
        self.calls = []

    def note(self, key: str, text: str) -> None:
        """Something that the report says."""
        self.notes.setdefault(key, text)

    def pop_stale(self) -> None:
        """Pop hooks and modes that a KeyboardInterrupt left behind (rule 17)."""
        stack = self._stack()
        while stack:
            call = stack.pop()
            call.close()
            call.settle()

    def _stack(self) -> list[Call]:
        stack: list[Call] | None = getattr(self._local, "stack", None)
        if stack is None:
            stack = self._local.stack = []
        return stack

    # Steps

    def begin_if_new(self) -> None:
        """A forward begins: does a new step begin with it? After a backward, or when the last graph was dropped."""
        stack = self._stack()
        if stack:
            if not stack[-1].is_stale():
                return
            self.pop_stale()
            self.backward_seen = True  # the interrupted step is over
        if self.begun and not self.calls:
            return
        if self.calls and not self.backward_seen:
            first = self._first_frame
            if first is None or first() is not None:
                return  # several forwards before one backward
        self.step_began()
        self.begun = True
        self._num_calls, self._step_recordings = len(self.calls), 0
        self.calls = []
        self.backward_seen = False
        self._first_frame = None
        self.streams.begin(self.home)
        self.generation += 1
        self.steps += 1

    def backward_entered(self, index: int) -> None:
        """The backward has reached block call ``index``."""
        self.backward_seen = True
        if self.listener is not None:
            self.listener.backward_entered(index)
        else:
            self.keeper.reach(("before", index))

    # A block call

    def before(self, block: Block, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The pre-forward hook; ``module`` is what is called, the block's own unless it was replicated."""
        if not torch.is_grad_enabled() or not self.active or replaying.active:
            return
        stack = self._stack()
        if stack:
            if not stack[-1].is_stale():
                return  # inside another block: its saved tensors are that block's
            self.pop_stale()
        tensors, key, fields = read_arguments(args, kwargs, objects=not block.ignores_fields)
        why = why_aside(block.module, module, tensors)
        if why:
            self.note(f"aside {why}", f"stepped aside: {why}")
            return
        if block.mode == "plain" or block.mode == "descent":
            return
        forget_failed_passes()
        if self.backward_seen or not self.calls:
            self.begin_if_new()
        stream = self.streams.enter(tensors, self.home)
        if self.streams.several:
            self.note(f"aside {SEVERAL}", f"stepped aside: {SEVERAL}")
            return
        if block.watched != self.generation:
            block.look(self.generation)
        if block.written or block.partitioned:
            key.append(block.readable())
        flags = numeric_flags()
        signature = block.signatures.of(key, fields, tensors, block.module.training, block.own, flags)
        call = Call(block, len(self.calls), tensors, args, kwargs)
        call.flags = flags
        call.stream = stream
        call.owner = sys._getframe(2)
        self.calls.append(call)
        entry = block.entries.get(signature) or self._adopt(block, signature)
        if call.index == 0:
            self.first_called(call, entry)
        if self.listener is not None:
            self.listener.block_entered(call)
        call.signature = signature
        if block.mode == "fallback":
            call.compiled = None
            call.open(park(call), random=True)
        elif entry is None or entry.record_again or entry.epoch != entry.state.epoch:
            self._start_recording(call)
        else:
            call.entry = entry
            call.compiled = entry.state.compile(self.links.accept(call, entry.state, self.choose, self.calls))
            if not self._leaves_alone(call, entry, call.compiled):
                call.open(park_and_snapshot(call) if call.compiled.snapshots else park(call))
        stack.append(call)

    def after(self, block: Block, output: Any) -> None:
        """The post-forward hook, also on exceptions (``output`` is ``None`` then)."""
        stack = self._stack()
        if not stack or stack[-1].block is not block:
            return
        call = stack.pop()
        call.close()
        failed = sys.exc_info()[0] is not None and output is None
        if failed:
            call.keep_all()
            call.settle()
            return
        if call.stream is not None and call.stream.left:
            self.streams.several = True
            call.keep_all()
        elif call.recorder is not None:
            self._finish_recording(call, output)
        elif block.mode == "fallback":
            self._fall_back(call)
        else:
            self._finish(call, output)
        self.links.leave(call, output, self.calls, watched=self.listener is not None)
        if call.index == 0 or self.listener is not None or self.keeper.minds(("before", call.index)):
            call.watch_backward(BackwardHook(self, call.index))
        if call.index == 0:
            self._first_frame = weakref.ref(call.kept_frame) if call.kept_frame is not None else None
        call.settle()
        if self.listener is not None:
            self.listener.block_left(call)
        else:
            self.keeper.reach(("after", call.index))

    def _adopt(self, block: Block, signature: Any) -> Entry | None:
        """A recording of a block that has been recorded equal to this one before (rule 10)."""
        found = recorded_alike(block, self.blocks, signature)
        if found is None:
            return None
        adopted = Entry(found.state)
        remember(signature, adopted, block=block, blocks=self.blocks, states=self.states)
        return adopted

    # Recording

    def _start_recording(self, call: Call) -> None:
        call.versions = [t._version for t in call.tensors]
        call.recorder = Recorder(call.leaves(), owner=call.owner, stream=call.stream)
        call.started = time.perf_counter()
        call.open(park(call), random=True)

    def _finish_recording(self, call: Call, output: Any) -> None:
        started = time.perf_counter()
        block, recorder, inputs = call.block, call.recorder, call.tensors
        assert recorder is not None
        call.recorder = None
        block.resets.learn(recorder.resets)
        outputs = tensors_in(output)
        custom: set[int] = set()
        for node in graph.custom_nodes(outputs, inputs):
            custom |= set() if only_reads(node) else call.packed_by(node)
        program = recorder.finish(outputs, graph.fingerprint(outputs, inputs), custom)
        elapsed = max(started - call.started - program.record_seconds, 1e-9)
        program.forward_seconds = program.forward_seconds or elapsed  # on CUDA that of the ops: nobody waits for them
        checkpoints.report(self.note, block.name, program.graph, seen=recorder.checkpoints)
        self.recorded += 1
        self.record_seconds += time.perf_counter() - call.started
        if not self._is_cheap() or not any(entry.state.is_resized(program) for entry in block.entries.values()):
            block.recordings_in_a_row += 1
        why = (self.whole and block.partitioned and WHOLE) or program.not_replayable or program.strays(self.home)
        if not why and block.recordings_in_a_row > MAX_RECORDINGS_IN_A_ROW:
            why = UNSTEADY
        if why:
            self._not_replayable(call, program, why)
            return
        state = state_of(self.states, program)
        state.add_time(program)
        entry = Entry(state)
        block.compare_fields(call.signature, entry)
        previous = block.entries.get(call.signature)
        entry.recordings = previous.recordings + 1 if previous is not None else 1
        entry.record_after = 2 ** min(entry.recordings, 10) if program.unproven else 0
        remember(call.signature, entry, block=block, blocks=self.blocks, states=self.states)
        call.entry = entry
        call.compiled = state.compile(self.links.accept(call, state, self.choose, self.calls))
        call.fresh = True
        self._finish(call, output)

    def _is_cheap(self) -> bool:
        """Whether the recordings of this step cost a forward at most: then lengths may change with every batch."""
        self._step_recordings += 1
        return self._step_recordings * RECORDING_FORWARDS <= self._num_calls

    def _not_replayable(self, call: Call, program: Program, why: str) -> None:
        """Rule 13: descend, then fall back, else leave it plain."""
        block = call.block
        safe, children = block.stop_replaying(program, why)
        at = self.blocks.index(block) + 1
        for offset, (name, child) in enumerate(children):
            own = f"{block.name}.{name}" if block.name else name
            self.add_block(own, child, parent=block.name, at=at + offset)
        if safe:
            self._fall_back(call)
        else:
            call.keep_all()

    def _fall_back(self, call: Call) -> None:
        due = self._turns.due(type(call.block.module).__qualname__, self.steps)
        call.fall_back(defer=self.defer, hashed=due or call.block.reruns < VERIFIED_CALLS)

    # Replaying

    def _leaves_alone(self, call: Call, entry: Entry, compiled: CompiledPolicy) -> bool:
        # NOTE [Left to autograd]: without hooks, autograd keeps what it saves at no cost, and compares versions itself.
        # One call in sixteen is parked all the same, and compared with its recording; so is one whose backward somebody
        # waits for, and what ZeRO-3 has gathered, which must not be kept.
        watched = call.index == 0 or self.listener is not None or self.keeper.minds(("before", call.index))
        settled = not entry.record_after and not self._checks_graph(entry)
        call.alone = compiled.saves_all and settled and not watched and not call.block.partitioned
        return call.alone

    def _finish(self, call: Call, output: Any) -> None:
        entry, compiled = call.entry, call.compiled
        assert entry is not None
        assert compiled is not None
        block, state = call.block, entry.state
        if not call.fresh and not call.alone:
            difference = call.differs()
            if not difference and self._checks_graph(entry):
                outputs = tensors_in(output)
                if graph.fingerprint(outputs, call.tensors) != state.program.graph:
                    difference = "its autograd graph changed"
            if difference:
                self.note(f"differs {block.name}", f"`{block.name}` was recorded again: {difference}")
                block.forget(call.signature)
                call.keep_all()
                return
        entry.calls += 1
        if entry.record_after:
            entry.record_after -= 1
            entry.record_again = entry.record_after == 0
        if compiled.saves_all:
            call.save_all()
            return
        frame = call.frame()
        frame.defer = self.defer
        frame.demote = state.demoter(self, block.name)
        frame.distrust = state.distrust
        frame.link_failed = partial(self.links.failed, block)
        frame.written = partial(self._written, block)
        if compiled.dropped and entry.calls <= VERIFIED_CALLS:
            frame.holders = Holders(state, compiled, call.handles)
        hashed = self._turns.due(state.key, self.steps)
        if not call.fresh and entry.verified < VERIFIED_CALLS - 1:
            # NOTE [Verified without room]: comparing values needs both at once. Where the budget has no room for that,
            # all bits are hashed now and compared when the backward asks for them.
            entry.verified += 1
            hashed = True
            wrong = verify(call, frame, output) if self.has_room(call.index) else ""
            if wrong:
                self.note(f"demoted {state.key} {wrong}", f"`{block.name}`: {wrong}")
                block.forget(call.signature)  # what it computes may have changed
                call.keep_all()
                return
        if not call.fresh:
            block.recordings_in_a_row = 0
        young = call.fresh or entry.calls <= VERIFIED_CALLS
        call.apply(frame, hashed=hashed, inputs=Inputs(frame.written) if young else None)

    def _written(self, block: Block, argument: int) -> None:
        block.written.add(argument)
        self.note(
            f"written {block.name} {argument}",
            f"`{block.name}`: the model writes argument {argument} after the block has run, so nothing is recomputed "
            "from it",
        )

    def _checks_graph(self, entry: Entry) -> bool:
        """Always while a program is young, then now and then (walking a graph takes tens of microseconds)."""
        return entry.calls < GRAPH_CHECKED_CALLS or entry.calls % GRAPH_CHECK_PERIOD == 0
