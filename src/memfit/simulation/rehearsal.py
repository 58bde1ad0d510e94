"""One training step of a model on fake tensors, read as a live step is.

Inside blocks nothing is kept: what autograd would save is written down and made again, empty, when it is asked for. So
what the ledger shows at a block's entry, in its forward and in its backward, is what lies outside the blocks, without
any subtraction; and whatever of a block is still alive when the backward begins is held by somebody else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from memfit import graph
from memfit.costs import profile_program
from memfit.errors import ModelError
from memfit.links import input_node
from memfit.profiler import CallReading, Now, Reading, step_profile
from memfit.profiles import Link, ProgramProfile, StepProfile
from memfit.programs import Leaf, Program, Value
from memfit.signature import output_tensors, parameter_slots, read_arguments
from memfit.simulation.ledger import Ledger
from memfit.simulation.recording import FakeRecorder
from memfit.training import TrainingState

Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Parked:
    """What autograd would have saved: its geometry; the tensor itself if it is a parameter."""

    call: _Call
    index: int
    value: Value
    device: torch.device
    tensor: torch.Tensor | None


@dataclass(slots=True, eq=False)
class _Call:
    """One block call."""

    name: str
    index: int
    tensors: list[torch.Tensor] = field(default_factory=list)
    outputs: list[tuple[int, StorageWeakRef]] = field(default_factory=list)
    recorder: FakeRecorder | None = None
    hooks: Any = None
    program: Program | None = None
    op_flops: list[float] = field(default_factory=list)
    input: tuple[int, int] | None = None
    """Which argument is which output of the call before."""
    forward_start: int = 0
    forward_seconds: float = 0.0
    backward_start: int | None = None
    backward_began: float = 0.0
    backward_order: int = -1
    gradients: int = 0
    made: dict[int, StorageWeakRef] = field(default_factory=dict)
    alive: set[int] = field(default_factory=set)
    input_alive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What a step showed.

    Attributes:
        profile: The solver's input.
        op_flops: Of each op of each program.
        parameter_bytes, gradient_bytes, state_bytes: Of the model, and of its optimizer once that has stepped.
        buffer_bytes: Of the model's buffers and of the batch.
        loss_bytes: What the loss and the head add at their highest to what is there when the last block has ended.
        optimizer_bytes: What the optimizer's step adds to what it finds.
        forward_flops, backward_flops: Of one micro-batch, nothing recomputed.
        step_seconds: Of the step that recomputes nothing.
        optimizer_seconds: Of which the optimizer's step.
        looked_at_values: Whether the model asked for values.
        notes: What could not be planned for, and why.
        gradients: At each event of the profile.
    """

    profile: StepProfile
    op_flops: dict[str, list[float]]
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    state_bytes: int
    loss_bytes: int
    optimizer_bytes: int
    forward_flops: float
    backward_flops: float
    step_seconds: float
    optimizer_seconds: float
    looked_at_values: bool
    notes: tuple[str, ...]
    gradients: tuple[int, ...]


class Rehearsal:
    """Hooks on the blocks of a model of fake tensors, for one step."""

    def __init__(self, model: torch.nn.Module, blocks: list[tuple[str, torch.nn.Module]], ledger: Ledger) -> None:
        self._model = model
        self._ledger = ledger
        self._calls: list[_Call] = []
        self._stack: list[_Call] = []
        self._slots = {name: parameter_slots(module) for name, module in blocks}
        self._num_backward = 0
        self._loss_peak = 0
        self._states: TrainingState | None = None
        self._notes: dict[str, None] = {}
        self._hooks = []
        for name, module in blocks:
            self._hooks.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after, with_kwargs=True))

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(self, *exc: object) -> None:
        while self._stack:  # the forward failed
            call = self._stack.pop()
            assert call.recorder is not None
            call.recorder.__exit__(None, None, None)
            call.hooks.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()

    @property
    def not_replayable(self) -> set[str]:
        """Blocks that no recipe can bring back; the step has been read as if they kept nothing."""
        return {call.name for call in self._calls if call.program is not None and call.program.not_replayable}

    # The blocks

    def _before(self, name: str) -> Callable[..., None]:
        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._stack or not torch.is_grad_enabled():
                return
            tensors, _, _ = read_arguments(args, kwargs, objects=False)
            call = _Call(name, len(self._calls), tensors)
            call.input = self._linked(tensors)
            leaves = [(Leaf("input", i, "", ""), tensor) for i, tensor in enumerate(tensors)]
            for (owner, parameter), (kind, dictionary) in self._slots[name].items():
                leaves.append((Leaf(kind, -1, owner, parameter), dictionary[parameter]))
            call.forward_start = self._ledger.now
            call.forward_seconds = self._ledger.seconds
            call.recorder = FakeRecorder(leaves, self._ledger)
            call.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack(call), self._unpack)
            call.hooks.__enter__()
            call.recorder.__enter__()
            self._calls.append(call)
            self._stack.append(call)

        return before

    def _after(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._stack or self._stack[-1].name not in self._slots:
            return
        call = self._stack[-1]
        if module is not self._module(call.name):
            return
        self._stack.pop()
        recorder = call.recorder
        assert recorder is not None
        recorder.__exit__(None, None, None)
        call.hooks.__exit__(None, None, None)
        call.hooks = call.recorder = None
        outputs = output_tensors(output)
        if outputs:
            custom = {i for node in graph.custom_nodes(outputs, call.tensors) for i in _saved_by(node, call)}
            with _disable_current_modes():  # numbers that autograd holds are no fake tensors
                nodes = graph.fingerprint(outputs, call.tensors)
            call.program = recorder.finish(outputs, nodes, custom)
            call.op_flops = recorder.flops
            call.program.forward_seconds = max(self._ledger.seconds - call.forward_seconds, 1e-12)
            call.outputs = [(id(tensor), StorageWeakRef(tensor.untyped_storage())) for tensor in outputs]  # type: ignore[no-untyped-call]
        call.tensors = []
        self._ledger.reset_peak()  # what peaked inside is the program's

    def _module(self, name: str) -> torch.nn.Module:
        return self._model.get_submodule(name)

    def _linked(self, tensors: list[torch.Tensor]) -> tuple[int, int] | None:
        if not self._calls:
            return None
        before = {number: (place, weak.cdata) for place, (number, weak) in enumerate(self._calls[-1].outputs)}
        for argument, tensor in enumerate(tensors):
            place, storage = before.get(id(tensor), (0, None))
            if storage == tensor.untyped_storage()._cdata:
                return argument, place
        return None

    def _pack(self, call: _Call) -> Callable[[torch.Tensor], _Parked]:
        recorder = call.recorder
        assert recorder is not None
        count = 0

        def pack(tensor: torch.Tensor) -> _Parked:
            nonlocal count
            alias = tensor.detach()
            recorder.pack(alias)
            saved = recorder.program.saved[-1]
            node = recorder.program.nodes[saved.value.node]
            count += 1
            if node.leaf is not None and node.leaf.kind != "input":
                return _Parked(call, count - 1, saved.value, alias.device, alias)
            storage = alias.untyped_storage()
            if node.producer is not None:
                call.made[saved.value.node] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            return _Parked(call, count - 1, saved.value, alias.device, None)

        return pack

    def _unpack(self, parked: _Parked) -> torch.Tensor:
        if parked.call.backward_start is None:
            self._enter_backward(parked.call)
        if parked.tensor is not None:
            return parked.tensor
        value = parked.value
        return torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=parked.device)

    def _enter_backward(self, call: _Call) -> None:
        ledger = self._ledger
        if not self._num_backward:
            self._loss_peak = ledger.peak
            for each in self._calls:
                each.alive = {n for n, weak in each.made.items() if not weak.expired()}  # type: ignore[no-untyped-call]
                if each.input is not None:
                    weak = self._calls[each.index - 1].outputs[each.input[1]][1]
                    each.input_alive = not weak.expired()  # type: ignore[no-untyped-call]
        call.backward_start = ledger.now
        call.backward_began = ledger.seconds
        call.backward_order = self._num_backward
        assert self._states is not None
        call.gradients = self._states.gradient_bytes()
        self._num_backward += 1
        ledger.reset_peak()

    # The step

    def run(
        self,
        batch: Any,
        loss: Callable[[], torch.Tensor],
        optimizer: Callable[[Sequence[torch.Tensor]], Any] | None,
        *,
        resident: bool = False,
    ) -> Rehearsed:
        """Forward, backward and the optimizer's step.

        Args:
            batch: Tensors that are there throughout.
            loss: Calls the model.
            optimizer: Makes the optimizer of the parameters that train.
            resident: Whether gradients are there before the forward, as where they are accumulated.

        Raises:
            ModelError: No block took part in the backward, or the model looks at values.
        """
        ledger, model = self._ledger, self._model
        parameters = [p for p in model.parameters() if p.requires_grad]
        ledger.see(model.parameters())
        parameter_bytes = ledger.now
        ledger.see([*model.buffers(), *_tensors(batch)])
        self._states = states = TrainingState(model, None, torch.device("cpu"))
        start = ledger.now
        buffer_bytes = start - parameter_bytes
        ledger.reset_peak()
        flops, seconds = ledger.flops, ledger.seconds
        value = loss()
        forward_flops = ledger.flops - flops
        value.backward()  # type: ignore[no-untyped-call]
        del value
        backward_flops = ledger.flops - flops - forward_flops
        if not self._num_backward:
            raise ModelError(f"No block of {type(model).__name__} took part in the backward of this loss.")
        reading = Reading(start_bytes=start, start_gradients=0, start_state=0)
        reading.loss_peak, reading.end_peak = self._loss_peak, ledger.peak
        reading.gradients_end, reading.end_bytes = states.gradient_bytes(), ledger.now
        backward_ended = ledger.seconds
        made = optimizer(parameters) if optimizer is not None else None
        if made is not None:
            made.step()  # state is born
            states.stepped(made)
            ledger.reset_peak()
            before, seconds_before = ledger.now, ledger.seconds
            made.step()
            optimizer_bytes, optimizer_seconds = ledger.peak - before, ledger.seconds - seconds_before
            reading.optimizer_peak = ledger.peak
        else:
            optimizer_bytes, optimizer_seconds = 0, 0.0
        step_seconds = backward_ended - seconds + optimizer_seconds
        programs = self._profiles(backward_ended)
        reading.calls = [self._reading(call) for call in self._calls]
        born = states.state_bytes()
        now = Now(
            gradients_start=reading.gradients_end if resident else 0,
            settled_bytes=start + born + (reading.gradients_end if resident else 0),
            born_bytes=born,
            state_bytes=born,
            gradients_end=reading.gradients_end,
        )
        profile, _ = step_profile(reading, programs, now, device=torch.device("cpu"), step_seconds=step_seconds)
        return Rehearsed(
            profile=profile,
            op_flops={c.program.key: c.op_flops for c in self._calls if c.program is not None},
            parameter_bytes=parameter_bytes,
            buffer_bytes=buffer_bytes,
            gradient_bytes=reading.gradients_end,
            state_bytes=born,
            loss_bytes=self._loss_peak - start,
            optimizer_bytes=optimizer_bytes,
            forward_flops=forward_flops,
            backward_flops=backward_flops,
            step_seconds=step_seconds,
            optimizer_seconds=optimizer_seconds,
            looked_at_values=ledger.looked_at_values,
            notes=tuple(self._notes),
            gradients=self._gradients(profile, reading.gradients_end, resident=resident),
        )

    def _gradients(self, profile: StepProfile, end: int, *, resident: bool) -> tuple[int, ...]:
        order = sorted((c for c in self._calls if c.backward_start is not None), key=lambda c: c.backward_order)
        backward = iter([c.gradients for c in order if c.program is not None])
        found = []
        for event in profile.events:
            ended = event.name in ("optimizer", "end of backward")
            now = next(backward) if event.kind == "backward" else end if ended else 0
            found.append(end if resident else now)
        return tuple(found)

    def _profiles(self, ended: float) -> dict[str, ProgramProfile]:
        """Of every program: what its calls have in common."""
        order = sorted((c for c in self._calls if c.backward_start is not None), key=lambda c: c.backward_order)
        ends = [*(call.backward_began for call in order[1:]), ended]
        took = {call.index: end - call.backward_began for call, end in zip(order, ends, strict=True)}
        found: dict[str, ProgramProfile] = {}
        held: dict[str, set[int]] = {}
        for call in self._calls:
            if call.program is not None and call.backward_start is not None:
                held[call.program.key] = held.get(call.program.key, call.alive) & call.alive
        for call in self._calls:
            program = call.program
            if program is None or program.key in found or program.key not in held:
                continue
            taken = {node.storage for node in program.nodes if node.output or node.leaf is not None}
            alive = {n for n in held[program.key] if program.nodes[n].storage not in taken}
            profile = profile_program(program, held=alive)
            found[program.key] = replace(profile, backward_seconds=took[call.index])
        return found

    def _reading(self, call: _Call) -> CallReading:
        replayed = call.program is not None
        link = None
        if replayed and call.input is not None and not call.input_alive:
            link = self._link(call)
        return CallReading(
            call.name,
            mode="replay" if replayed else "plain",
            program=call.program.key if call.program is not None else "",
            link=link,
            forward_start=call.forward_start,
            forward_peak=call.forward_start,
            backward_start=call.backward_start,
            gradients=call.gradients,
            backward_order=call.backward_order,
        )

    def _link(self, call: _Call) -> Link | None:
        assert call.input is not None
        assert call.program is not None
        before = self._calls[call.index - 1].program
        if before is None:
            return None
        linked = input_node(call.program, call.input[0])
        output = before.outputs[call.input[1]].node
        if linked is None or (before.nodes[output].leaf is None and not before.nodes[output].recomputable):
            return None
        return Link(input=linked, output=output)


def _saved_by(node: Any, call: _Call) -> set[int]:
    """Which of a call's saved tensors a custom autograd Function saved."""
    raw = getattr(node, "_raw_saved_tensors", ()) or ()
    parked = [getattr(saved, "data", None) for saved in raw]
    return {each.index for each in parked if isinstance(each, _Parked) and each.call is call}


def _tensors(structure: Any) -> list[torch.Tensor]:
    if isinstance(structure, torch.Tensor):
        return [structure]
    if isinstance(structure, Mapping):
        structure = list(structure.values())
    return [t for item in structure for t in _tensors(item)] if isinstance(structure, (list, tuple)) else []
