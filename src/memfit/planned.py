"""The plans of one fitted model, and which of them a step follows.

A plan is made for a sequence of block calls. A step of smaller shapes, of the same ops otherwise, follows the plan of
the larger: it fits, and nothing has to be measured or solved for it. What that costs is recomputation that the smaller
step does not need; once it has cost as much as planning did, the smaller one gets a plan of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from memfit.entries import ProgramState
from memfit.fitted import Fitted
from memfit.keeper import NO_LIMITS, Keeper
from memfit.plans import Plan, Policy

MAX_SEQUENCES = 64
MAX_COSTS = 4096

Sequence = tuple[tuple[str, str], ...]
"""Of block calls: name of the block, key of its program."""


class Planned:
    """What has been planned.

    Attributes:
        active: The plan that the step follows, once its first block call has chosen one.
        unplanned: Whether a call of this step was in no plan.
        covered: Whether the step follows a plan made for larger shapes.
        planning_seconds: What the last plan took to make.
    """

    def __init__(self, keeper: Keeper, given: Plan | None = None) -> None:
        """None yet; what a ``given`` plan knows follows no other."""
        self._keeper = keeper
        self._given = {(call.name, call.program) for call in given.calls} if given is not None else set()
        self._plans: dict[Sequence, Fitted] = {}
        self._costs: dict[Sequence, float] = {}
        self.active: Fitted | None = None
        self.unplanned = self.covered = False
        self.planning_seconds = 0.0
        self._num_covered = 0

    def __len__(self) -> int:
        return len(self._plans)

    def __iter__(self) -> Iterator[tuple[Sequence, Fitted]]:
        return iter(list(self._plans.items()))

    def add(self, sequence: Sequence, fitted: Fitted) -> None:
        """A plan was made; of many, the one that has not been followed for longest is forgotten."""
        self._plans.pop(sequence, None)
        if len(self._plans) >= MAX_SEQUENCES:
            self._plans.pop(next(iter(self._plans)))
        self._plans[sequence] = fitted

    def drop(self, sequence: Sequence) -> None:
        """A plan no longer holds."""
        self._plans.pop(sequence, None)

    def begin(self) -> None:
        """A step begins."""
        self.active = None
        self.unplanned = self.covered = False

    def finish(self, sequence: Sequence, states: Mapping[str, ProgramState]) -> Fitted | None:
        """A step is over. The plan it followed, if such steps should from now on have one of their own."""
        active = self.active
        if active is None or self.unplanned or not self.covered:
            return None
        self._num_covered += 1
        if sequence in self._plans:
            return None
        share = active.share(sequence, states)
        cost = self._costs.get(sequence, 0.0) + active.plan.recompute_seconds * share
        self._costs[sequence] = cost
        if share <= 0 or cost < self.planning_seconds:
            if len(self._costs) > MAX_COSTS:
                self._costs.pop(next(iter(self._costs)))
            return None
        del self._costs[sequence]
        return active

    @property
    def story(self) -> str:
        """For the report: how many steps had no plan of their own; "" where all had."""
        steps = "1 step was" if self._num_covered == 1 else f"{self._num_covered} steps were"
        return f"{steps} of other shapes, and followed the plan of a larger one" if self._num_covered else ""

    @property
    def largest(self) -> Fitted | None:
        """The plan for the largest step that was profiled, if one is remembered."""
        profiled = [fitted for fitted in self._plans.values() if not fitted.derived]
        return max(profiled, key=lambda fitted: fitted.size, default=None)

    # Which plan

    def choose(self, state: ProgramState, index: int, name: str) -> Policy | None:
        """What block call ``index`` of this step does; ``None``: no plan knows."""
        if self.unplanned:
            return None
        active = self.active
        if active is not None:
            policy = active.policy_of(state, index, name, smaller=self.covered and self._may_follow(state, name))
            if policy is not None:
                return policy
        found = self._find(state, index, name)
        if found is None:
            self.unplanned = True
            if active is None:
                self._keeper.begin(NO_LIMITS)
            return None
        self.active, policy = found
        if active is None:
            self._keeper.begin(self.active.limits)
        else:
            self._keeper.limits = self.active.limits
        return policy

    def knows(self, state: ProgramState, name: str) -> bool:
        """Whether a step that begins with this call has a plan."""
        smaller = self._may_follow(state, name)
        return any(fitted.policy_of(state, 0, name, smaller=smaller) is not None for _, fitted in self)

    def takes(self, tensors: list[torch.Tensor], name: str) -> bool:
        """Whether a step that begins with a call of these arguments is likely to have one."""
        given = [tuple(tensor.shape) for tensor in tensors]
        return any(fitted.takes(given, name) for _, fitted in self)

    def _may_follow(self, state: ProgramState, name: str) -> bool:
        """Whether this call may follow a plan made for a larger one."""
        return (name, state.key) not in self._given

    def _find(self, state: ProgramState, index: int, name: str) -> tuple[Fitted, Policy] | None:
        """The plan for just this, else that for the smallest of what is larger."""
        for sequence, fitted in self:
            policy = fitted.policy_of(state, index, name, smaller=False)
            if policy is not None:
                self._plans[sequence] = self._plans.pop(sequence)
                return fitted, policy
        if not self._may_follow(state, name):
            return None
        best: tuple[Sequence, Fitted, Policy] | None = None
        for sequence, fitted in self:
            policy = fitted.policy_of(state, index, name, smaller=True)
            if policy is not None and (best is None or fitted.size < best[1].size):
                best = sequence, fitted, policy
        if best is None:
            return None
        self.covered = True
        self._plans[best[0]] = self._plans.pop(best[0])
        return best[1:]
