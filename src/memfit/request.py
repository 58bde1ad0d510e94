"""What was asked for: a switch, a function or a plan made before, instead of a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from memfit.plans import Plan, Policy
from memfit.profiles import ProgramProfile, StepProfile
from memfit.solver.links import settled
from memfit.solver.planner import make_plan
from memfit.solver.special import full_policy, plain_policy, selective_policy

PolicyChoice = str | Callable[[ProgramProfile], Policy] | None


@dataclass(slots=True, kw_only=True)
class Request:
    """What `fit` was given beside a budget.

    Attributes:
        policy: A switch by name, or a function from a program's profile to its policy.
        every_n_layers: ``policy`` holds for every n-th block, the others keep everything.
        plan: A plan made before.
    """

    policy: PolicyChoice = None
    every_n_layers: int = 1
    plan: Plan | None = None
    _places: dict[str, int] = field(default_factory=dict)

    @property
    def decides(self) -> bool:
        """Whether it says what every block does, so that nothing is left to a solver."""
        return self.policy is not None or self.plan is not None

    def number(self, blocks: Iterable[str]) -> None:
        """Which block is the n-th."""
        self._places = {name: i for i, name in enumerate(blocks)}

    def first(self, profile: ProgramProfile, name: str) -> Policy:
        """The policy of a call that no plan knows: what was asked for, else the smallest."""
        if self.plan is not None:
            for call in self.plan.calls:
                if call.name == name and call.program == profile.key:
                    return self.plan.policies[call.policy]
        if self.policy is not None:
            return self._forced(profile, name)
        return full_policy(profile)

    def plan_for(self, profile: StepProfile, *, model: str, fingerprint: str) -> Plan:
        """What was asked for as a plan; where nothing was, one that keeps everything."""
        choose = self.first if self.decides else _plain
        policies = [choose(profile.programs[call.program], call.name) for call in profile.calls]
        policies = settled(profile, policies)
        return make_plan(profile, policies, budget_bytes=None, model=model, fingerprint=fingerprint)

    def _forced(self, profile: ProgramProfile, name: str) -> Policy:
        if callable(self.policy):
            return self.policy(profile)
        if self._places.get(name, 0) % self.every_n_layers:
            return plain_policy(profile)
        named = {"full": full_policy, "selective": selective_policy, "plain": plain_policy}
        return named[self.policy or "full"](profile)


def _plain(profile: ProgramProfile, name: str) -> Policy:
    return plain_policy(profile)
