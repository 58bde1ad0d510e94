"""The handle of a fitted model: the first step measured, the plan kept true.

Step one keeps of each block as little as it can while the runtime records and a `Profiler` reads memory. When the next
step begins, what the coming steps will look like is known (gradients resident or fresh, optimizer state born or to be
reserved), and `Planning` has the solver pick the fastest plan. Afterwards predicted and measured peak are compared, and
the plan is corrected. A step of smaller shapes follows the plan of a larger one (`Planned`); what no plan knows (a
larger shape, another number of forwards) is run and profiled like step one, `Occasions` permitting.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from memfit.blocks import find_blocks
from memfit.calls import Call
from memfit.clock import StepClock
from memfit.compiled import split_compiled
from memfit.decider import Decider
from memfit.devices import Part
from memfit.entries import Entry, ProgramState
from memfit.errors import ModelError
from memfit.exhaustion import Exhaustion, ExhaustionHook
from memfit.fingerprints import fingerprint
from memfit.fitted import saves_nothing, unfitted_on_error
from memfit.heads import ChunkedLoss
from memfit.hooks import CountHook, ModelHook, OptimizerHook
from memfit.keeper import Keeper
from memfit.memory import Meter, meter
from memfit.modes import Modes
from memfit.occasions import Occasions
from memfit.planned import Planned
from memfit.planning import Planning
from memfit.plans import Plan, Policy
from memfit.profiler import Profiler
from memfit.profiles import StepProfile
from memfit.ranks import Ranks
from memfit.report.text import render
from memfit.request import Request
from memfit.runtime import Runtime
from memfit.sharding import class_name
from memfit.slack import Slack
from memfit.streams import capturing
from memfit.summaries import block_rows, describe, notes_of, unplanned_row
from memfit.training import TrainingState
from memfit.utilization import Utilization


class Handle(Part):
    """A fitted model. Also a context manager: leaving it removes Memfit from the model."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        budget: int | Literal["min"] | None,
        request: Request,
        blocks: list[str] | None,
        optimizer: Any,
        device: torch.device,
        chunked_loss: bool | Literal["auto"] = False,
        alone: bool = True,
        lead: Handle | None = None,
    ) -> None:
        """Use `fit`; ``alone``: no parameters are on other devices; ``lead``: the first of a model with several."""
        super().__init__()
        home = None if alone else device
        self._model = weakref.ref(model)
        self._name = class_name(model)
        self._device = device
        self._budget = budget
        self._meter: Meter = meter(device)
        self.training = TrainingState(model, optimizer, device, alone=alone)
        self._fingerprint = fingerprint(model)
        self._profiler: Profiler | None = None
        self._removed = False
        self._steps = 0
        self._measured: int | None = None
        self._peak_open = False
        self._slack = Slack(device.type)
        self.ranks = Ranks(self._name, self._fingerprint)
        self._clock = StepClock()
        self._planned_step = False
        self._last_calls: list[dict[str, Any]] = []
        self._modes: Modes = Modes(model) if lead is None else lead._modes
        self._request = request
        self._measures_only = budget is None and not request.decides
        found = find_blocks(model, blocks)
        self._block_names = [name for name, _ in found]
        hooked, compiled = split_compiled(model, found)
        self.runtime: Runtime = Runtime(model, [] if self._measures_only else hooked)
        self.runtime.blocks += compiled
        self.runtime.keeper = Keeper(self._meter)
        self._planned = Planned(self.runtime.keeper, request.plan)
        self._work = Utilization(self.runtime, device, counts=not compiled and lead is None)
        self._occasions = Occasions()
        self.runtime.choose = self._choose
        self.runtime.whole = budget == "min" or request.is_full
        self.runtime.has_room = self._has_room
        self.runtime.step_began = self._step_began
        self.runtime.first_called = self._first_called
        self.runtime.defer = self.ranks.defer
        request.number(self._block_names)
        self.exhaustion = Exhaustion(
            model,
            self.runtime,
            self._meter,
            self.training,
            self._block_names,
            request,
            budget,
            home,
        )
        decider = Decider(
            request,
            self._slack,
            self._meter,
            name=self._name,
            fingerprint=self._fingerprint,
            keeper=self.runtime.keeper,
            place="" if alone else f" on `{device}`",
            advise=self.exhaustion.advice_below,
        )
        self._hooks: list[Any] = [
            register_optimizer_step_pre_hook(OptimizerHook(self, before=True)),
            register_optimizer_step_post_hook(OptimizerHook(self, before=False)),
            model.register_forward_pre_hook(ModelHook(self, before=True)),
            model.register_forward_hook(ModelHook(self, before=False), always_call=True),
            model.register_forward_pre_hook(CountHook(self, before=True), with_kwargs=True),
            model.register_forward_hook(CountHook(self, before=False), with_kwargs=True, always_call=True),
            model.register_forward_hook(ExhaustionHook(self.exhaustion), always_call=True),
        ]
        self._chunked_loss = ChunkedLoss(model, chunked_loss)  # its hooks run after ours, which may have it begin
        self._planning = Planning(
            self._planned,
            decider,
            self._slack,
            self.runtime,
            self._meter,
            self.training,
            self._clock,
            self.ranks,
            budget=budget,
            decides=request.decides,
            chunked_loss=self._chunked_loss,
        )
        self.runtime.home = home
        self.join(lead)
        if lead is None:
            fitted_models[model] = weakref.ref(self)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.failed(error)
        if not self._removed:
            self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._removed else "planned" if self.plan is not None else "waiting for its first step"
        return f"<memfit.Handle of {self._name}: {state}>"

    def remove(self) -> None:
        """Make the model exactly what it was.

        Raises:
            ModelError: It has been removed already.
        """
        if self._removed:
            raise ModelError(f"Memfit was removed from this {self._name} before. Call `memfit.fit` to fit it again.")
        for part in self.lead.parts:
            part.take_off()

    def take_off(self) -> None:
        """Of one device."""
        self._removed = True
        self._finish_step()
        self._meter.show_what_lives(False)
        self.runtime.keeper.relax()
        self.runtime.remove()
        self._work.remove()
        for hook in self._hooks:
            hook.remove()
        self._modes.restore()
        self._chunked_loss.remove()
        self._profiler = None
        self._planning.pending = None
        model = self._model()
        if model is not None and self.lead is self:
            fitted_models.pop(model, None)

    # Choosing

    def _choose(self, state: ProgramState, index: int, name: str) -> Policy | None:
        policy = self._planned.choose(state, index, name)
        if policy is not None:
            return policy
        with unfitted_on_error(self):
            return self._request.first(self._planning.profile(state), name)

    def _has_room(self, index: int) -> bool:
        """Whether a block call's values may be held twice while they are verified."""
        if not isinstance(self._budget, int):
            return self._budget is None
        fitted = self._planned.active
        if fitted is None or index not in fitted.forward_bytes:
            return False
        predicted, twice = fitted.forward_bytes[index]
        return predicted + twice <= self._budget - self._slack.bytes and self._meter.allocated() + twice <= self._budget

    # Steps

    def _step_began(self) -> None:
        """The first block call after a backward (or at all) is about to run."""
        self._finish_step()
        with unfitted_on_error(self):
            self._planning.settle()
        self._planned.begin()
        self._work.step_ended(self._clock.tick())
        if (self.profiles_again() or not self._planned) and not self._measures_only:
            self._profile_step()
        else:
            self.runtime.keeper.restart()
            self._peak_open = True
        self._planned_step = bool(self._planned) or self._measures_only

    def _first_called(self, call: Call, entry: Entry | None) -> None:
        """The step's first block call is about to run: has it a plan, or should the step be profiled?"""
        if self._profiler is not None or self._measures_only:
            return
        known = True
        if call.block.mode == "replay":
            name, planned = call.block.name, self._planned
            known = planned.takes(call.tensors, name) if entry is None else planned.knows(entry.state, name)
        if self._occasions.is_due(known=known):
            self._peak_open = False
            self._profile_step()
            self.others_profile_again()

    def _profile_step(self) -> None:
        self.training.look()
        self._meet()
        self._profiler = Profiler(self._meter, self.training.gradient_bytes, self.training.state_bytes)
        self.runtime.listener = self._profiler
        self.exhaustion.begin()
        self._clock.skip()

    def _meet(self) -> None:
        """A step is profiled, and its forward is running: who else runs it?"""
        model = self._model()
        if model is not None:
            with unfitted_on_error(self):
                self.ranks.begin(model)

    def _finish_step(self) -> None:
        """What the step that ended has shown."""
        self.exhaustion.end()
        if not self.runtime.calls and not self._measures_only:
            return
        profiler, self._profiler = self._profiler, None
        self.runtime.listener = None
        if self.runtime.calls:
            self._last_calls = [describe(call) for call in self.runtime.calls]
        sequence = tuple((c.block.name, c.program_key) for c in self.runtime.calls)
        planned = self._planned
        if profiler is not None:
            profiler.backward_ended()
            if profiler.complete or saves_nothing(self.runtime):
                self._planning.pending = (profiler, sequence)
                self._occasions.profiled()
        elif planned.unplanned:
            self._occasions.surprised()
        elif self._peak_open:
            self._occasions.followed()
            peak = self.runtime.keeper.observe()
            if self._planned_step:
                self._measured = peak if self._measured is None else max(self._measured, peak)
                self._learn(peak)
                larger = planned.finish(sequence, self.runtime.states)
                if larger is not None:
                    self._planning.larger = (larger, sequence)
        self._peak_open = False

    def _learn(self, peak: int) -> None:
        active = self._planned.active
        if active is None or self._budget is None:
            return
        limit, smallest = active.limits.budget, self._budget == "min"
        if peak > limit or not self._planned.covered:  # a smaller step wastes nothing
            self._slack.learn(active, peak_bytes=peak, budget=limit, smallest=smallest)

    # Reading

    def _hold(self, budget: int) -> bool:
        """Let the plans in force hold a budget, in bytes; whether there are any."""
        for _, fitted in self._planned:
            fitted.hold(budget)
        return bool(self._planned)

    def optimizer_event(self, optimizer: torch.optim.Optimizer, *, before: bool) -> None:
        """Any torch optimizer is about to step, or has stepped."""
        if not self.owns(optimizer):
            return
        if before:
            self.ranks.before_optimizer()
            if self._profiler is not None:
                self._profiler.backward_ended()
            return
        self._steps += 1
        self.training.stepped(optimizer)
        if self._measures_only:
            self._work.step_ended(self._clock.tick())  # nothing is hooked that would see the next step begin
        if self._profiler is not None:
            self._profiler.optimizer_stepped(self.training.state_bytes())
        elif self._peak_open:
            self.runtime.keeper.close(final=torch._C._current_graph_task_id() == -1)
        self.runtime.generation += 1

    def forward_event(self, module: torch.nn.Module, *, before: bool) -> None:
        """The model's forward begins, or is over."""
        if not before:
            self._modes.leave()
        elif torch.is_grad_enabled() and module.training:
            self._modes.enter()
            if not capturing():
                self.runtime.begin_if_new()
        else:
            self._modes.leave()  # a KeyboardInterrupt ended the last forward

    def count_event(self, module: torch.nn.Module, args: Any, kwargs: Any, *, before: bool, failed: bool) -> None:
        """The same, with what the forward is given."""
        if not before:
            self._work.forward_ends(failed=failed)
        elif torch.is_grad_enabled() and module.training:
            self._work.forward_begins(args, kwargs)
        else:
            self._work.plain_forward_begins()

    # Reporting

    @property
    def own_plan(self) -> Plan | None:
        """Of this device."""
        return self._planning.plan

    @property
    def profile(self) -> StepProfile | None:
        """What a step costs, as the solver saw it, on this device; ``None`` before the first step."""
        return self._planned.active.profile if self._planned.active is not None else None

    def report(self) -> str:
        """What was decided, predicted and measured, as text."""
        return render(self.summary())

    def own_summary(self) -> dict[str, Any]:
        """Of this device."""
        self._read_open_peak()
        plan = self._planning.plan
        blocks = block_rows(self._last_calls, self.runtime.blocks, self.runtime.states)
        saved = sum(row["saved_bytes"] or 0 for row in blocks)
        recomputed = sum(row["recomputed_bytes"] or 0 for row in blocks)
        if self._measures_only:
            blocks = [unplanned_row(name) for name in self._block_names]
        own = [*self._modes.notes, *self._chunked_loss.notes, *self._request.notes]
        stories = self.ranks.story, self._planned.story, self.exhaustion.story
        plain_peak = self._measured if self._measures_only else None
        if plan is not None:
            plain_peak = plan.plain_peak_bytes
        return {
            "model": self._name,
            "device": str(self._device),
            "budget_bytes": self._budget if isinstance(self._budget, int) else None,
            "budget": self._budget if isinstance(self._budget, str) else None,
            "predicted_peak_bytes": plan.predicted_peak_bytes if plan is not None else None,
            "measured_peak_bytes": self._measured,
            "plain_peak_bytes": plain_peak,
            "peak_event": plan.peak_event if plan is not None else None,
            "step_seconds": self._clock.median(),
            "recompute_seconds": plan.recompute_seconds if plan is not None else None,
            "saved_bytes": saved if self._last_calls else None,
            "recomputed_bytes": recomputed if self._last_calls else None,
            "context_bytes": self._meter.outside() if self._device.type == "cuda" else None,
            **self._work.summary(self._last_calls, self.runtime.states),
            "steps": self._steps,
            "notes": notes_of(self.runtime, [*own, *stories], self._steps),
            "blocks": blocks,
        }

    def _read_open_peak(self) -> None:
        """Include the step that is just over in the measurement."""
        if self._peak_open and self._planned_step and not self._planned.unplanned and not self._removed:
            peak = self.runtime.keeper.observe()
            self._measured = peak if self._measured is None else max(self._measured, peak)


fitted_models: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[Handle]] = weakref.WeakKeyDictionary()
