"""Make the plans of one fitted model: from profiled steps, and again when what they showed is no longer true."""

from __future__ import annotations

import time
from dataclasses import replace
from hashlib import sha256
from typing import Literal

from memfit.clock import StepClock
from memfit.costs import profile_program
from memfit.decider import Decider
from memfit.entries import ProgramState
from memfit.errors import InfeasibleBudgetError
from memfit.fitted import Fitted
from memfit.heads import ChunkedLoss
from memfit.memory import Meter
from memfit.planned import Planned, Sequence
from memfit.plans import Plan
from memfit.profiler import Now, Profiler, step_profile
from memfit.profiles import ProgramProfile, StepProfile
from memfit.ranks import Ranks
from memfit.runtime import Runtime
from memfit.slack import Slack
from memfit.solver.frontier import block_options
from memfit.solver.losses import pays, with_chunked_loss
from memfit.training import TrainingState


class Planning:
    """Of one fitted model.

    Attributes:
        plan: Of the largest step that was profiled.
        programs: What each program costs, by its key, and the version of it for which that holds.
        pending: What the last step showed, if it was profiled, and its block calls.
        larger: A plan, and the calls of smaller steps that follow it and should have one of their own.
    """

    def __init__(
        self,
        planned: Planned,
        decider: Decider,
        slack: Slack,
        runtime: Runtime,
        meter: Meter,
        training: TrainingState,
        clock: StepClock,
        ranks: Ranks,
        *,
        budget: int | Literal["min"] | None,
        decides: bool,
        chunked_loss: ChunkedLoss,
    ) -> None:
        """Plans go to ``planned``; ``decides``: a request says what every block does, so that no budget is solved."""
        self._chunked_loss = chunked_loss
        self.plan: Plan | None = None
        self.pending: tuple[Profiler, Sequence] | None = None
        self.larger: tuple[Fitted, Sequence] | None = None
        self._planned = planned
        self._decider = decider
        self._slack = slack
        self._runtime = runtime
        self._meter = meter
        self._training = training
        self._clock = clock
        self._ranks = ranks
        self.programs: dict[str, tuple[int, ProgramProfile]] = {}
        self._budget = budget
        self._decides = decides

    def profile(self, state: ProgramState) -> ProgramProfile:
        """What a program costs, as it is known now."""
        known = self.programs.get(state.key)
        if known is None or known[0] != state.version:
            known = (state.version, profile_program(state.program, held=state.held, demoted=state.demoted))
            for key in self.programs.keys() - self._runtime.states.keys():
                del self.programs[key]
            self.programs[state.key] = known
        return known[1]

    def settle(self) -> None:
        """Solve for what the last step showed, and again when the optimizer's state has been born."""
        if self.pending is not None:
            profiler, sequence = self.pending
            self.pending = None
            self._fit(profiler, sequence)
        else:
            self._ranks.absent(self._runtime.steps)
        for key, fitted in self._planned:
            if not self._planned:
                break  # the loss is chunked from now on
            born = fitted.state_reserved and self._training.born
            if fitted.stale or born or fitted.is_outdated(self._runtime.states):
                if fitted.derived:
                    self._planned.drop(key)  # steps like these follow the larger plan again
                else:
                    self._fit(fitted.profiler, key, together=born)
        if self.larger is not None:
            larger, sequence = self.larger
            self.larger = None
            self._fit_smaller(larger, sequence)

    def _fit(self, profiler: Profiler, sequence: Sequence, *, together: bool = True) -> None:
        began = time.perf_counter()
        reading = profiler.reading
        states = self._runtime.states
        if any(key and key not in states for _, key in sequence):
            self._planned.drop(sequence)  # made for programs that have been forgotten
            return
        programs = {key: self.profile(states[key]) for _, key in sequence if key in states}
        resident = self._training.gradient_bytes()
        device = self._meter.device
        if not self._planned:
            for program in list(programs.values())[:1]:
                block_options(program)  # let the solver's code and workspaces grow the process before it is measured
        self._meter.release()
        now = Now(
            gradients_start=resident,
            settled_bytes=self._meter.now() if device.type == "cpu" else self._meter.allocated(),
            born_bytes=self._training.state_bytes(),
            state_bytes=self._training.state_bytes() if self._training.born else self._training.reserved_bytes(),
            gradients_end=max(resident, reading.gradients_end),
        )
        profile, indices = step_profile(reading, programs, now, device=device, step_seconds=self._clock.median() or 0.0)
        try:
            plan, given = self._ranks.decide(
                profile,
                self._decider.plan,
                which=sha256(repr(sequence).encode()).hexdigest(),
                step=self._runtime.steps,
                budget=self._budget,
                born=self._training.born,
                together=together,
            )
        except InfeasibleBudgetError:
            if not self._chunks_loss(profile, None):
                raise
            return
        if self._chunks_loss(profile, plan):
            return
        if given:
            self._decider.expect(profile, self._budget)
        self._keep(sequence, plan, indices, profiler, profile)
        self._planned.planning_seconds = time.perf_counter() - began

    def _chunks_loss(self, profile: StepProfile, plan: Plan | None) -> bool:
        """Whether the loss is chunked from now on, since that pays: then the step is to be profiled again."""
        if not self._chunked_loss.waits or self._decides or self._budget is None:
            return False
        if self._ranks.ranks:
            self._chunked_loss.left = "`auto` is decided where one rank trains alone; write `chunked_loss=True`"
            return False
        if plan is not None and not plan.recompute_seconds and self._budget != "min":
            return False
        chunked = with_chunked_loss(profile, gradient_bytes=self._chunked_loss.gradient_bytes())
        if chunked is None:
            return False
        expected = self._decider.would(chunked, self._budget)
        if not pays(expected, plan, profile, smallest=self._budget == "min"):
            return False
        self._chunked_loss.begin()
        self.larger = None
        for key, _ in self._planned:
            self._planned.drop(key)  # made for a step with logits
        return True

    def _fit_smaller(self, larger: Fitted, sequence: Sequence) -> None:
        """A plan of its own for a step that has followed that of a ``larger`` one."""
        states = self._runtime.states
        if not isinstance(self._budget, int) or self._decides or larger.share(sequence, states) == 0:
            return
        programs = {key: self.profile(states[key]) for _, key in sequence if key in states}
        profile = larger.resized(sequence, programs)
        plan = self._decider.again(profile, self._budget)
        if plan is not None:
            self._keep(sequence, plan, larger.indices, larger.profiler, profile, derived=True)

    def _keep(
        self,
        sequence: Sequence,
        plan: Plan,
        indices: list[int],
        profiler: Profiler,
        profile: StepProfile,
        *,
        derived: bool = False,
    ) -> None:
        raw = plan.predicted_peak_bytes
        predicted = raw + (self._slack.bytes if self._budget is not None else 0)
        limit = self._budget if isinstance(self._budget, int) else None
        if limit is not None:
            predicted = min(predicted, limit)
        plan = replace(plan, predicted_peak_bytes=predicted, budget_bytes=limit)
        limit = predicted if self._budget == "min" else limit
        reserved = not self._training.born
        states = self._runtime.states
        fitted = Fitted(plan, raw, indices, profiler, profile, reserved, limit, states, derived=derived)
        self._planned.add(sequence, fitted)
        largest = self._planned.largest
        if largest is not None:
            self.plan = largest.plan
