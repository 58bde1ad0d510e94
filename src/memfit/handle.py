"""The handle of a fitted model: the first step measured, the plan kept true.

Step one keeps of each block as little as it can while the runtime records and a `Profiler` reads memory. When the next
step begins, what the coming steps will look like is known (gradients resident or fresh, optimizer state born or to be
reserved), and the solver picks the fastest plan. Afterwards predicted and measured peak are compared, and the plan is
corrected. A sequence of block calls that was not seen before (another shape, another number of forwards) is run and
profiled like step one.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from hashlib import sha256
from typing import Any, Literal

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from memfit.blocks import find_blocks
from memfit.clock import StepClock
from memfit.compiled import split_compiled
from memfit.costs import profile_program
from memfit.decider import Decider
from memfit.entries import ProgramState
from memfit.errors import ModelError
from memfit.exhaustion import Exhaustion, ExhaustionHook
from memfit.fingerprints import fingerprint
from memfit.fitted import Fitted, unfitted_on_error
from memfit.hooks import ModelHook, OptimizerHook
from memfit.keeper import NO_LIMITS, Keeper
from memfit.memory import Meter, meter
from memfit.modes import Modes
from memfit.plans import Plan, Policy
from memfit.profiler import Now, Profiler, step_profile
from memfit.profiles import ProgramProfile, StepProfile
from memfit.ranks import Ranks
from memfit.report.text import render
from memfit.request import Request
from memfit.runtime import Runtime
from memfit.sharding import class_name
from memfit.slack import Slack
from memfit.solver.frontier import block_options
from memfit.summaries import block_rows, describe, notes_of, unplanned_row
from memfit.training import TrainingState

MAX_SEQUENCES = 64


class Handle:
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
    ) -> None:
        """Use `fit`."""
        self.plan: Plan | None = None
        self._model = weakref.ref(model)
        self._name = class_name(model)
        self._device = device
        self._budget = budget
        self._meter: Meter = meter(device)
        self._training = TrainingState(model, optimizer, device)
        self._fingerprint = fingerprint(model)
        self._programs: dict[str, tuple[int, ProgramProfile]] = {}
        self._plans: dict[tuple[tuple[str, str], ...], Fitted] = {}
        self._active: Fitted | None = None
        self._unplanned = self._last_was_unplanned = False
        self._profiler: Profiler | None = None
        self._pending: tuple[Profiler, list[tuple[str, str]]] | None = None
        self._removed = False
        self._steps = 0
        self._measured: int | None = None
        self._peak_open = False
        self._slack = Slack(device.type)
        self.ranks = Ranks(self._name, self._fingerprint)
        self._clock = StepClock()
        self._planned_step = False
        self._last_calls: list[dict[str, Any]] = []
        self._modes = Modes(model)
        self._request = request
        self._measures_only = budget is None and not request.decides
        found = find_blocks(model, blocks)
        self._block_names = [name for name, _ in found]
        hooked, compiled = split_compiled(model, found)
        self.runtime = Runtime(model, [] if self._measures_only else hooked)
        self.runtime.blocks += compiled
        self.runtime.choose = self._choose
        self.runtime.whole = budget == "min" or request.is_full
        self.runtime.has_room = self._has_room
        self.runtime.keeper = Keeper(self._meter)
        self.runtime.step_began = self._step_began
        self.runtime.defer = self.ranks.defer
        request.number(self._block_names)
        self.exhaustion = Exhaustion(
            model, self.runtime, self._meter, self._training, self._programs, self._block_names, request, budget
        )
        self._decider = Decider(
            request,
            self._slack,
            self._meter,
            name=self._name,
            fingerprint=self._fingerprint,
            keeper=self.runtime.keeper,
            advise=self.exhaustion.advice_below,
        )
        self._hooks = [
            register_optimizer_step_pre_hook(OptimizerHook(self, before=True)),
            register_optimizer_step_post_hook(OptimizerHook(self, before=False)),
            model.register_forward_pre_hook(ModelHook(self, before=True)),
            model.register_forward_hook(ModelHook(self, before=False), always_call=True),
            model.register_forward_hook(ExhaustionHook(self.exhaustion), always_call=True),
        ]
        fitted_models[model] = weakref.ref(self)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.exhaustion.passing(error)
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
        self._removed = True
        self._finish_step()
        self._meter.show_what_lives(False)
        self.runtime.keeper.relax()
        self.runtime.remove()
        for hook in self._hooks:
            hook.remove()
        self._modes.restore()
        self._profiler = None
        self._pending = None
        model = self._model()
        if model is not None:
            fitted_models.pop(model, None)

    # Choosing

    def _choose(self, state: ProgramState, index: int, name: str) -> Policy | None:
        fitted = self._active
        if index == 0:
            self.runtime.keeper.begin(NO_LIMITS)
        if fitted is not None and not self._unplanned:
            policy = fitted.policies.get(index)
            if policy is not None and policy.program == state.key and fitted.names[index] == name:
                return policy
            for other in self._plans.values():
                policy = other.policies.get(index)
                if policy is not None and policy.program == state.key and other.names.get(index) == name:
                    self._active = other
                    self.runtime.keeper.limits = other.limits
                    return policy
        if index == 0:
            self._active = None
            for other in self._plans.values():
                policy = other.policies.get(0)
                if policy is not None and policy.program == state.key and other.names.get(0) == name:
                    self._active = other
                    self._unplanned = False
                    self.runtime.keeper.begin(other.limits)
                    return policy
        self._unplanned = True
        with unfitted_on_error(self):
            return self._request.first(self._profile(state), name)

    def _has_room(self, index: int) -> bool:
        """Whether a block call's values may be held twice while they are verified."""
        if not isinstance(self._budget, int):
            return self._budget is None
        fitted = self._active
        if fitted is None or index not in fitted.forward_bytes:
            return False
        predicted, twice = fitted.forward_bytes[index]
        return predicted + twice <= self._budget - self._slack.bytes and self._meter.now() + twice <= self._budget

    def _profile(self, state: ProgramState) -> ProgramProfile:
        known = self._programs.get(state.key)
        if known is None or known[0] != state.version:
            known = (state.version, profile_program(state.program, held=state.held, demoted=state.demoted))
            for key in self._programs.keys() - self.runtime.states.keys():
                del self._programs[key]
            self._programs[state.key] = known
        return known[1]

    # Steps

    def _step_began(self) -> None:
        """The first block call after a backward (or at all) is about to run."""
        self._finish_step()
        with unfitted_on_error(self):
            self._settle_plan()
        self._unplanned = False
        self._active = None
        self._clock.tick()
        needed = not self._plans or self._last_was_unplanned
        if needed and not self._measures_only:
            self._training.look()
            self._meet()
            self._profiler = Profiler(self._meter, self._training.gradient_bytes, self._training.state_bytes)
            self.runtime.listener = self._profiler
            self.exhaustion.begin()
            self._clock.skip()
        else:
            self.runtime.keeper.restart()
            self._peak_open = True
        self._planned_step = bool(self._plans) or self._measures_only

    def _meet(self) -> None:
        """A step is profiled, and its forward is running: who else runs it?"""
        model = self._model()
        if model is not None:
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
        sequence = [(c.block.name, c.program_key) for c in self.runtime.calls]
        self._last_was_unplanned = self._unplanned
        if profiler is not None:
            profiler.backward_ended()
            if profiler.complete:
                self._pending = (profiler, sequence)
                self._last_was_unplanned = False
        elif self._peak_open and not self._unplanned:
            self._peak_open = False
            peak = self.runtime.keeper.observe()
            if self._planned_step:
                self._measured = peak if self._measured is None else max(self._measured, peak)
                if self._active is not None and self._budget is not None:
                    limit, smallest = self._active.limits.budget, self._budget == "min"
                    self._slack.learn(self._active, peak_bytes=peak, budget=limit, smallest=smallest)
        self._peak_open = False

    def _settle_plan(self) -> None:
        """Solve for what the last step showed, and again when the optimizer's state has been born."""
        if self._pending is not None:
            profiler, sequence = self._pending
            self._pending = None
            self._fit_sequence(profiler, tuple(sequence))
        else:
            self.ranks.absent(self.runtime.steps)
        for key, fitted in list(self._plans.items()):
            born = fitted.state_reserved and self._training.born
            if fitted.stale or born or fitted.is_outdated(self.runtime.states):
                self._fit_sequence(fitted.profiler, key, together=born)

    def _fit_sequence(
        self, profiler: Profiler, sequence: tuple[tuple[str, str], ...], *, together: bool = True
    ) -> None:
        reading = profiler.reading
        states = self.runtime.states
        if any(key and key not in states for _, key in sequence):
            self._plans.pop(sequence, None)  # made for programs that have been forgotten
            return
        programs = {key: self._profile(states[key]) for _, key in sequence if key in states}
        resident = self._training.gradient_bytes()
        if not self._plans:
            for program in list(programs.values())[:1]:
                block_options(program)  # let the solver's code and workspaces grow the process before it is measured
        self._meter.release()
        now = Now(
            gradients_start=resident,
            settled_bytes=self._meter.now() if self._device.type == "cpu" else self._meter.allocated(),
            born_bytes=self._training.state_bytes(),
            state_bytes=self._training.state_bytes() if self._training.born else self._training.reserved_bytes(),
            gradients_end=max(resident, reading.gradients_end),
        )
        profile, indices = step_profile(
            reading, programs, now, device=self._device, step_seconds=self._clock.median() or 0.0
        )
        plan, given = self.ranks.decide(
            profile,
            self._decider.plan,
            which=sha256(repr(sequence).encode()).hexdigest(),
            step=self.runtime.steps,
            budget=self._budget,
            born=self._training.born,
            together=together,
        )
        if given:
            self._decider.expect(profile, self._budget)
        raw = plan.predicted_peak_bytes
        predicted = raw + (self._slack.bytes if self._budget is not None else 0)
        if isinstance(self._budget, int):
            predicted = min(predicted, self._budget)
        limit = self._budget if isinstance(self._budget, int) else None
        self.plan = replace(plan, predicted_peak_bytes=predicted, budget_bytes=limit)
        limit = predicted if self._budget == "min" else limit
        versions = {key: states[key].version for key in programs}
        fitted = Fitted(self.plan, raw, indices, profiler, profile, not self._training.born, limit, versions)
        if len(self._plans) >= MAX_SEQUENCES:
            self._plans.pop(next(iter(self._plans)))
        self._plans[sequence] = fitted

    # Reading

    def optimizer_event(self, optimizer: torch.optim.Optimizer, *, before: bool) -> None:
        """Any torch optimizer is about to step, or has stepped."""
        if not self._training.owns(optimizer):
            return
        if before:
            self.ranks.before_optimizer()
            if self._profiler is not None:
                self._profiler.backward_ended()
            return
        self._steps += 1
        self._training.stepped(optimizer)
        if self._profiler is not None:
            self._profiler.optimizer_stepped(self._training.state_bytes())
        elif self._peak_open:
            self.runtime.keeper.observe()  # somebody else may begin a new peak before we do
        self.runtime.generation += 1

    def forward_event(self, module: torch.nn.Module, *, before: bool) -> None:
        """The model's forward begins, or is over."""
        if not before:
            self._modes.leave()
        elif torch.is_grad_enabled() and module.training:
            self._modes.enter()
            self.runtime.begin_if_new()
        else:
            self._modes.leave()  # a KeyboardInterrupt ended the last forward

    # Reporting

    @property
    def profile(self) -> StepProfile | None:
        """What a step costs, as the solver saw it; ``None`` before the first step."""
        return self._active.profile if self._active is not None else None

    def report(self) -> str:
        """What was decided, predicted and measured, as text."""
        return render(self.summary())

    def summary(self) -> dict[str, Any]:
        """The report as data that `json.dumps` takes: raw bytes and seconds, ``None`` where unknown."""
        self._read_open_peak()
        plan = self.plan
        blocks = block_rows(self._last_calls, self.runtime.blocks, self._programs)
        saved = sum(row["saved_bytes"] or 0 for row in blocks)
        recomputed = sum(row["recomputed_bytes"] or 0 for row in blocks)
        if self._measures_only:
            blocks = [unplanned_row(name) for name in self._block_names]
        stories = self.ranks.story, self.exhaustion.story
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
            "steps": self._steps,
            "notes": notes_of(self.runtime, [*self._modes.notes, *self._request.notes, *stories], self._steps),
            "blocks": blocks,
        }

    def _read_open_peak(self) -> None:
        """Include the step that is just over in the measurement."""
        if self._peak_open and self._planned_step and not self._unplanned and not self._removed:
            peak = self.runtime.keeper.observe()
            self._measured = peak if self._measured is None else max(self._measured, peak)


fitted_models: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[Handle]] = weakref.WeakKeyDictionary()
