"""What was asked for: a switch, a function or a plan made before, instead of a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from memfit.errors import PlanError, UsageError
from memfit.plans import Plan, Policy
from memfit.profiles import ProgramProfile, StepProfile
from memfit.solver.links import settled
from memfit.solver.planner import make_plan
from memfit.solver.special import full_policy, plain_policy, selective_policy
from memfit.solver.working_set import kept_bytes, recipe_ops

PolicyChoice = str | Callable[[ProgramProfile], Policy] | None


@dataclass(slots=True, kw_only=True)
class Request:
    """What `fit` was given beside a budget.

    Attributes:
        policy: A switch by name, or a function from a program's profile to its policy.
        every_n_layers: ``policy`` holds for every n-th block, the others keep everything.
        plan: A plan made before.
        notes: What the report says of them.
    """

    policy: PolicyChoice = None
    every_n_layers: int = 1
    plan: Plan | None = None
    notes: list[str] = field(default_factory=list)
    _strangers: bool = False
    _places: dict[str, int] = field(default_factory=dict)

    @property
    def decides(self) -> bool:
        """Whether it says what every block does, so that nothing is left to a solver."""
        return self.policy is not None or self.plan is not None

    @property
    def is_full(self) -> bool:
        """Whether every block is to recompute all it can."""
        return self.policy == "full" and self.every_n_layers == 1

    def number(self, blocks: Iterable[str]) -> None:
        """Which block is the n-th."""
        self._places = {name: i for i, name in enumerate(blocks)}

    def first(self, profile: ProgramProfile, name: str) -> Policy:
        """The policy of a call that no plan knows: what was asked for, else the smallest.

        Raises:
            UsageError: The function that was given as a policy returned something else.
        """
        if self.plan is not None:
            for call in self.plan.calls:
                if call.name == name and call.program == profile.key:
                    policy = self.plan.policies[call.policy]
                    if _is_possible(profile, policy):
                        return policy
            self._note_stranger(name)
        if self.policy is not None:
            return self._forced(profile, name)
        return full_policy(profile)

    def plan_for(self, profile: StepProfile, *, model: str, fingerprint: str) -> Plan:
        """What was asked for as a plan; where nothing was, one that keeps everything."""
        choose = self.first if self.decides else _plain
        policies = [choose(profile.programs[call.program], call.name) for call in profile.calls]
        policies = settled(profile, policies)
        return make_plan(profile, policies, budget_bytes=None, model=model, fingerprint=fingerprint)

    def _note_stranger(self, name: str) -> None:
        if self._strangers:
            return
        self._strangers = True
        self.notes.append(
            f"the plan does not know what `{name}` ran here (another batch shape, autocast or torch than it was made "
            "for): such calls recompute all they can; make a plan for them with `memfit.plan`"
        )

    def _forced(self, profile: ProgramProfile, name: str) -> Policy:
        if callable(self.policy):
            policy = self.policy(profile)
            if not isinstance(policy, Policy) or not _is_possible(profile, policy):
                what = "one that this block cannot run" if isinstance(policy, Policy) else type(policy).__name__
                raise UsageError(
                    f"The function given as `policy` returned {what} for `{name}`, not a policy. Return "
                    "`memfit.plans.Policy(program=profile.key, kept=...)`."
                )
            return policy
        if self._places.get(name, 0) % self.every_n_layers:
            return plain_policy(profile)
        named = {"full": full_policy, "selective": selective_policy, "plain": plain_policy}
        return named[self.policy or "full"](profile)


def _is_possible(profile: ProgramProfile, policy: Policy) -> bool:
    """Whether a program can run under a policy, which may come from a file."""
    num_nodes = len(profile.nodes)
    if policy.program != profile.key or any(n >= num_nodes for n in (*policy.kept, *policy.narrowed)):
        return False
    try:
        kept_bytes(profile, policy)
        recipe_ops(profile, policy)
    except PlanError:
        return False
    return True


def _plain(profile: ProgramProfile, name: str) -> Policy:
    return plain_policy(profile)
