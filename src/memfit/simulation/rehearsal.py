"""One training step of a model on fake tensors, read as a live step is.

Of blocks nothing is kept but their parameters and what they return: all else that autograd would save is let go when
the block's forward ends, and made again, empty, when it is asked for. So what the ledger shows between forwards, and
where a block's backward begins, is what lies outside the blocks, without any subtraction; and whatever else of a block
is alive when the backward begins is held by somebody else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from memfit import graph
from memfit.errors import ModelError
from memfit.profiler import Now, Reading, step_profile
from memfit.profiles import ProgramProfile
from memfit.signature import parameter_slots, read_arguments, tensors_in
from memfit.simulation.call import Call, Parked, linked, look, packing, saved_by, storages
from memfit.simulation.doubles import Template, key_of, kind_of, stand_in, template
from memfit.simulation.exchanges import with_exchanges, without_gradients
from memfit.simulation.ledger import Ledger
from memfit.simulation.parallel import Team
from memfit.simulation.recording import FakeRecorder, leaves_of
from memfit.simulation.results import Rehearsed, gradients_at_events, held_nodes, outlived, profiles, read, spans
from memfit.simulation.whole import BackwardWatch, LocalRecorder
from memfit.training import TrainingState

_RECORDED = 2
"""Calls that are recorded before others are passed over for them; the last block of a kind always is."""


class Rehearsal:
    """Hooks on the blocks of a model of fake tensors, for one step."""

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: list[tuple[str, torch.nn.Module]],
        ledger: Ledger,
        *,
        doubles: bool = True,
        team: Team | None = None,
    ) -> None:
        """Put them there.

        Args:
            model: On fake tensors.
            blocks: From `find_blocks`.
            ledger: Sees what the step does.
            doubles: Whether blocks that are as others are passed over (see `doubles`).
            team: What the model shares with other devices; what it was sharded by, it has been.
        """
        self._model = model
        self._ledger = ledger
        self._blocks = blocks
        self._team = team if team is not None else Team()
        self._together = self._team.together
        self._entered: Call | None = None  # whose backward was the last to begin
        self._ending: Call | None = None  # whose backward has ended, while no other has begun
        self._calls: list[Call] = []
        self._stack: list[Call] = []
        self._slots = {name: parameter_slots(module) for name, module in blocks}
        self._num_backward = 0
        self._outside_flops = 0.0  # until the first backward: the ledger's when the last forward had ended
        self._loss_peak = 0
        self._states: TrainingState | None = None
        self._templates: dict[Hashable, list[Template]] = {}
        self._kinds = {name: kind_of(module) for name, module in blocks} if doubles else {}
        self._last = {kind: name for name, kind in self._kinds.items()}  # of each kind: it is always recorded
        self._modules = dict(blocks)
        self._during: dict[str, Hashable] = {}  # their kinds when they were last recorded, these hooks included
        self._own: dict[str, Any] = {}  # forwards that somebody has given a block
        self._hooks = []
        for name, module in blocks:
            self._own[name] = vars(module).get("forward")
            module.forward = partial(self._forward, name, module.forward)
            self._hooks.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            # What shards a block takes its parameters away when its own forward hook runs.
            first = self._team.shards
            self._hooks.append(module.register_forward_hook(self._after, with_kwargs=True, prepend=first))

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(self, *exc: object) -> None:
        while self._stack:  # the forward failed
            call = self._stack.pop()
            if call.recorder is not None:
                call.recorder.__exit__(None, None, None)
                call.hooks.__exit__(None, None, None)
        for name, module in self._modules.items():
            del module.forward
            if self._own[name] is not None:
                module.forward = self._own[name]
        for hook in self._hooks:
            hook.remove()

    @property
    def differs(self) -> bool:
        """Whether a block ran another program than those that seemed equal to it, or what it made outlived it.

        Then none may be passed over.
        """
        if any(len({each.program.key for each in known}) > 1 for known in self._templates.values()):
            return True
        used = {call.template.program.key for call in self._calls if call.template is not None}
        return any(outlived(c) for c in self._calls if c.program is not None and c.program.key in used)

    @property
    def not_replayable(self) -> set[str]:
        """Blocks that no recipe can bring back; the step has been read as if they kept nothing."""
        return {call.name for call in self._calls if call.program is not None and call.program.not_replayable}

    # The blocks

    def _before(self, name: str) -> Callable[..., None]:
        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._stack or not torch.is_grad_enabled():
                return
            tensors, rest, _ = read_arguments(args, kwargs, objects=False)
            call = Call(name, len(self._calls), tensors, inputs=storages(tensors), whole=self._team.splits)
            if self._together:
                call.forward_peak = self._ledger.peak
                for tensor in tensors:
                    if tensor.requires_grad:
                        tensor.register_hook(partial(self._leave_backward, call))  # type: ignore[no-untyped-call]
            if not self._team.shards and not self._team.splits:
                call.input = linked(self._calls, tensors)
            self._team.transient()
            call.forward_start = self._ledger.now
            call.forward_seconds, call.forward_flops = self._ledger.seconds, self._ledger.flops
            self._calls.append(call)
            self._stack.append(call)
            if name in self._kinds:
                call.key = key_of(self._kinds[name], tensors, rest)
                call.template = self._equal(call)
            if call.template is not None:
                return
            if call.key is not None:
                self._during[name] = kind_of(module)
            leaves = leaves_of(tensors, self._slots[name], self._team.reads)
            if self._team.splits:
                call.recorder, call.watch = LocalRecorder(leaves, self._ledger), BackwardWatch(self._ledger)
                call.ledger = self._ledger
            else:
                call.recorder = FakeRecorder(leaves, self._ledger)
            call.hooks = torch.autograd.graph.saved_tensors_hooks(packing(call, self._team.refers_to), self._unpack)
            call.hooks.__enter__()
            call.recorder.__enter__()

        return before

    def _equal(self, call: Call) -> Template | None:
        """What a call is passed over for: two have been recorded alike, and one more will be."""
        known = self._templates.get(call.key) or []
        if len(known) < _RECORDED or self._last[self._kinds[call.name]] == call.name:
            return None
        return known[0] if len({each.program.key for each in known}) == 1 else None

    def _forward(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._stack[-1] if self._stack else None
        if call is None or call.name != name or call.template is None:
            return original(*args, **kwargs)
        made = call.template
        self._ledger.seconds += made.seconds
        self._ledger.flops += made.flops
        trained = [p for p in self._modules[name].parameters() if p.requires_grad]  # gathered, where it is sharded
        self._team.passed_over(name, self._calls[made.index].name, made.seconds)
        begins = partial(self._begin_backward, call, self._last[self._kinds[name]])  # whose own was before
        return stand_in(made, [*call.tensors, *trained], begins)

    def _after(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._stack or module is not self._modules[self._stack[-1].name]:
            return  # a block inside another
        call = self._stack.pop()
        outputs = tensors_in(output)
        call.outputs = [(id(tensor), StorageWeakRef(tensor.untyped_storage())) for tensor in outputs]  # type: ignore[no-untyped-call]
        recorder, call.recorder = call.recorder, None
        if recorder is None:
            assert call.template is not None
            call.program, call.op_flops = call.template.program, self._calls[call.template.index].op_flops
        else:
            recorder.__exit__(None, None, None)
            call.hooks.__exit__(None, None, None)
            call.hooks = None
        if recorder is not None and outputs:
            custom = {i for node in graph.custom_nodes(outputs, call.tensors) for i in saved_by(node, call)}
            with _disable_current_modes():  # numbers that autograd holds are no fake tensors
                nodes = graph.fingerprint(outputs, call.tensors)
            call.program = recorder.finish(outputs, nodes, custom)
            call.op_flops = recorder.flops
            seconds, flops = self._ledger.seconds - call.forward_seconds, self._ledger.flops - call.forward_flops
            call.program.forward_seconds = max(seconds, 1e-12)
            for parked, alias in call.parked:
                if parked.value is not None and call.program.nodes[parked.value.node].output:
                    parked.tensor = alias  # a plan can drop it no more than its caller can
            made = template(call.index, call.program, output, seconds=seconds, flops=flops)
            if made is not None and call.key is not None and kind_of(module) == self._during[call.name]:
                self._templates.setdefault(call.key, []).append(made)
            if outputs[0].grad_fn is not None and not self._together:
                outputs[0].grad_fn.register_prehook(lambda gradients: self._begin_backward(call))
        call.tensors, call.parked = [], []
        call.forward_transient = self._team.transient()
        self._outside_flops = self._ledger.flops
        self._ledger.reset_peak()  # what peaked inside is the program's

    def _unpack(self, parked: Parked) -> torch.Tensor:
        self._begin_backward(parked.call)
        return parked.found()

    def _begin_backward(self, call: Call, like: str | None = None) -> None:
        """The gradient of its output is there. What is made of that before anything is unpacked is in its program."""
        if call.backward_start is not None:
            return
        ledger = self._ledger
        call.before_peak = ledger.peak
        if not self._num_backward:
            self._loss_peak = ledger.peak
            self._outside_flops = ledger.flops - self._outside_flops
            look(self._calls)
        call.backward_start = ledger.now
        call.backward_seconds, call.backward_flops = ledger.seconds, ledger.flops
        call.backward_order = self._num_backward
        assert self._states is not None
        call.gradients = self._team.gradient_bytes(self._states)
        transient = self._team.transient()
        if self._entered is not None:
            self._entered.transient = transient
        self._entered = call
        self._num_backward += 1
        if self._team.traffic is not None:
            self._team.traffic.window = self._num_backward
        self._ending = None
        ledger.reset_peak()
        ledger.watcher = None
        if call.watch is not None:
            call.watch.begin()
        self._team.entered(call.name, like)

    def _leave_backward(self, call: Call, gradient: torch.Tensor | None = None) -> None:
        """What follows, until the next one begins, is outside the blocks: gradients are reduced, weights gathered."""
        if self._ending is not call and call.backward_start is not None:
            self._ending = call
            self._ledger.reset_peak()
            self._ledger.watcher = None

    def _last_leaves(self) -> None:
        last = max(self._calls, key=lambda call: call.backward_order, default=None)
        if self._ending is None and last is not None:
            self._leave_backward(last)

    def _without_gradients(self, profile: ProgramProfile) -> ProgramProfile:
        call = next(c for c in self._calls if c.program is not None and c.program.key == profile.key)
        trained = [p for p in self._modules[call.name].parameters() if p.requires_grad]
        return without_gradients(profile, [p.numel() * p.element_size() for p in trained])

    # The step

    def run(
        self,
        batch: Any,
        loss: Callable[[], torch.Tensor],
        optimizer: Callable[[Sequence[torch.Tensor]], Any] | None,
        *,
        resident: bool = False,
        like: Rehearsed | None = None,
    ) -> Rehearsed:
        """Forward, backward and the optimizer's step.

        Args:
            batch: Tensors that are there throughout.
            loss: Calls the model.
            optimizer: Makes the optimizer of the parameters that train.
            resident: Whether gradients are there before the forward, as where they are accumulated.
            like: A step of the same model, batch and optimizer with another loss: what both do alike is taken from it.

        Raises:
            ModelError: No block took part in the backward, or the model looks at values.
        """
        ledger, model = self._ledger, self._model
        for parameter in model.parameters():
            parameter.grad = None
        parameters = [p for p in model.parameters() if p.requires_grad]
        ledger.see(model.parameters())
        parameter_bytes = ledger.now
        ledger.see([*model.buffers(), *tensors_in(batch)])
        self._states = states = TrainingState(model, None, torch.device("cpu"))
        buffer_bytes = ledger.now - parameter_bytes
        parameter_bytes += self._team.start(model, self._blocks, ledger)
        start = ledger.now
        ledger.reset_peak()
        flops, seconds = ledger.flops, ledger.seconds
        value = loss()
        forward_flops, forward_seconds = ledger.flops - flops, ledger.seconds - seconds
        if self._together:
            queue = torch.autograd.Variable._execution_engine.queue_callback
            value.register_hook(lambda _: queue(self._last_leaves))  # type: ignore[no-untyped-call]  # before theirs
        value.backward()  # type: ignore[no-untyped-call]
        del value
        self._team.ended()
        ledger.watcher = None
        if self._entered is not None:
            self._entered.transient = self._team.transient()
        if self._team.traffic is not None:
            self._team.traffic.settle(ledger.seconds)
        backward_flops = ledger.flops - flops - forward_flops
        if not self._num_backward:
            raise ModelError(f"No block of {type(model).__name__} took part in the backward of this loss.")
        reading = Reading(start_bytes=start, start_gradients=0, start_state=0)
        reading.loss_peak, reading.end_peak = self._loss_peak, ledger.peak
        reading.gradients_end, reading.end_bytes = self._team.gradient_bytes(states), ledger.now
        backward_ended, backward_flops_ended = ledger.seconds, ledger.flops
        made = self._team.optimizer(optimizer, parameters) if optimizer is not None and like is None else None
        if made is not None:
            ledger.reset_peak()
            made.step()  # state is born at its beginning, and there when its temporaries are
            states.stepped(made)
        born = states.state_bytes() if like is None else like.state_bytes
        optimizer_bytes = ledger.peak - reading.end_bytes if like is None else like.optimizer_bytes
        optimizer_seconds = ledger.seconds - backward_ended if like is None else like.optimizer_seconds
        if optimizer is not None:
            reading.optimizer_peak = reading.end_bytes + optimizer_bytes
        took = spans(self._calls, self._templates, backward_ended, backward_flops_ended)
        step_seconds = backward_ended - seconds + optimizer_seconds + sum(extra for _, extra, _ in took.values())
        if self._team.traffic is not None:
            late = [took[c.index][1] for c in sorted(self._calls, key=lambda c: c.backward_order) if c.index in took]
            step_seconds += self._team.traffic.exposed_seconds(late)
        backward_flops += sum(extra for _, _, extra in took.values())
        held = held_nodes(self._calls)
        programs = profiles(self._calls, took, held, like, ledger.narrow_seconds)
        if self._team.moves_gradients:
            known = {} if like is None else like.profile.programs
            programs = {k: p if known.get(k) is p else self._without_gradients(p) for k, p in programs.items()}
        reading.calls = [read(call, self._calls) for call in self._calls]
        there = self._team.resident_bytes(reading.gradients_end) if resident else 0
        now = Now(
            gradients_start=there,
            settled_bytes=start + born + there,
            born_bytes=born,
            state_bytes=born,
            gradients_end=reading.gradients_end,
        )
        profile, _ = step_profile(reading, programs, now, device=torch.device("cpu"), step_seconds=step_seconds)
        gradients = gradients_at_events(
            self._calls,
            profile,
            max(reading.gradients_end, there) if resident else reading.gradients_end,
            resident=resident,
        )
        if self._together:
            profile, gradients = with_exchanges(
                profile, gradients, self._calls, state=born, resident=there, end_peak=reading.end_peak
            )
        gradients = tuple(size + self._team.buffered_bytes for size in gradients)
        return Rehearsed(
            profile=profile,
            op_flops={c.program.key: c.profiled_flops for c in self._calls if c.program is not None},
            parameter_bytes=parameter_bytes,
            buffer_bytes=buffer_bytes,
            state_bytes=born,
            forward_flops=forward_flops,
            backward_flops=backward_flops,
            outside_flops=self._outside_flops,
            step_seconds=step_seconds,
            optimizer_seconds=optimizer_seconds,
            optimizer_bytes=optimizer_bytes,
            held=held,
            looked_at_values=ledger.looked_at_values,
            draws=any(op.random for c in self._calls if c.program is not None for op in c.program.ops),
            gradients=gradients,
            forward_seconds=forward_seconds,
        )
