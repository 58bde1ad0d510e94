"""Make the plan for a profile, as it was asked for: within a budget, the smallest, or as a request says."""

from __future__ import annotations

from collections.abc import Callable

from memfit.errors import InfeasibleBudgetError
from memfit.keeper import Keeper
from memfit.memory import Meter
from memfit.plans import Plan
from memfit.profiles import StepProfile
from memfit.ranks import Budget
from memfit.request import Request
from memfit.slack import Slack
from memfit.solver.planner import solve


class Decider:
    """Of one fitted model."""

    def __init__(
        self,
        request: Request,
        slack: Slack,
        meter: Meter,
        *,
        name: str,
        fingerprint: str,
        keeper: Keeper,
        place: str,
        advise: Callable[[StepProfile, int], str | None],
    ) -> None:
        """For a model's class and fingerprint.

        Args:
            request: What was asked for beside a budget.
            slack: What plans leave free.
            meter: Of the model's device.
            name: Of the model's class.
            fingerprint: Of the model.
            keeper: Of the budget.
            place: Words for an error that say which of several devices it is about, or "".
            advise: What to do about a budget that leaves nothing for activations.
        """
        self._request = request
        self._slack = slack
        self._meter = meter
        self._name = name
        self._fingerprint = fingerprint
        self._keeper = keeper
        self._place = place
        self._advise = advise

    def expect(self, profile: StepProfile, budget: Budget) -> Plan:
        """A plan that leaves no room; how much there should be is noted."""
        if budget == "min":
            plan = solve(profile, budget="min", model=self._name, fingerprint=self._fingerprint)
        else:
            plan = self._request.plan_for(profile, model=self._name, fingerprint=self._fingerprint)
        if budget is not None:
            base = self._meter.now()
            dynamic = max(0, plan.predicted_peak_bytes - base)
            limit = budget if isinstance(budget, int) else None
            self._slack.expect(dynamic, budget=limit, base_bytes=base, limited=self._keeper.limits_heap)
        return plan

    def plan(self, profile: StepProfile, budget: Budget) -> Plan:
        """The plan.

        Raises:
            InfeasibleBudgetError: None fits.
        """
        plan = self.expect(profile, budget)
        if isinstance(budget, int) and not self._request.decides:
            plan = self._within_budget(profile, budget)
        return plan

    def again(self, profile: StepProfile, budget: int) -> Plan | None:
        """A plan for a smaller step, with the room that the larger one has; ``None`` where that does not fit."""
        try:
            return self._solve(profile, budget, self._slack.bytes)
        except InfeasibleBudgetError:
            return None

    def would(self, profile: StepProfile, budget: Budget) -> Plan | None:
        """The plan for a profile that may come true, with the room that there is now; ``None`` where none fits."""
        if budget == "min":
            return solve(profile, budget="min", model=self._name, fingerprint=self._fingerprint)
        return self.again(profile, budget) if isinstance(budget, int) else None

    def _within_budget(self, profile: StepProfile, budget: int) -> Plan:
        """The fastest plan that leaves room for the allocator's slack; where that is too much, as much as there is."""
        slack = self._slack
        found: Plan | None = None
        for size in dict.fromkeys([slack.bytes, slack.least]):
            try:
                plan = self._solve(profile, budget, size)
            except InfeasibleBudgetError as error:
                short, smallest = error, error.minimum - size
                continue
            if found is None or plan.recompute_seconds + slack.least_seconds < found.recompute_seconds:
                found = plan
                slack.settle(size)
        if found is not None:
            return found
        if smallest > budget:
            advice = self._advise(profile, budget) or short.advice
            raise InfeasibleBudgetError(budget, smallest, short.event + self._place, advice) from None
        slack.settle(budget - smallest)
        return self._solve(profile, budget, slack.bytes)

    def _solve(self, profile: StepProfile, budget: int, slack: int) -> Plan:
        return solve(profile, budget=budget, margin_bytes=slack, model=self._name, fingerprint=self._fingerprint)
