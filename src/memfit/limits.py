"""When freed memory has to be handed back so that a planned step stays within its budget (CPU).

What an allocator holds but nobody uses is part of the resident set. Most of it serves the next allocation of its size;
what is too scattered for that lies there while memory grows elsewhere. Handing it back costs page faults, so it is done
only where the next events could not grow by all that they need and stay within the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from memfit import host
from memfit.memory import Meter
from memfit.plans import Policy
from memfit.profiles import StepProfile
from memfit.solver.peak import simulate_policies
from memfit.solver.working_set import working_set

NEAR_SHARE = 0.8
"""Where the peak stays under this share of the budget, freed memory may lie where it is."""
SCATTER = 1.5
"""By how much more than its tensors need memory may grow, since freed memory of another size does not serve them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """By how much memory grows between two moments of a step, in bytes; where there is nothing to mind, no moment.

    Attributes:
        budget: What may be held at most.
        start: From before the first block call on; ``None``: never mind.
        after: From the end of the forward of a block call on, by its index in the step.
        before: From the begin of the backward of a block call on.
    """

    budget: int = 0
    start: int | None = None
    after: dict[int, int] = field(default_factory=dict)
    before: dict[int, int] = field(default_factory=dict)


class Keeper:
    """Keeps what is held so low that a plan's next events fit. Not on CUDA, whose allocator joins what it frees."""

    def __init__(self, meter: Meter | None = None) -> None:
        """Of the device of ``meter``; without one it keeps nothing."""
        self._meter = meter if meter is not None and meter.device.type == "cpu" else None
        self._eager = False
        self.limits = Limits()

    def begin(self, limits: Limits) -> None:
        """A step begins under these."""
        self.limits = limits
        if limits.start is not None:
            self.keep(limits.start)
        else:
            self.relax()

    def left(self, index: int) -> None:
        """The forward of a block call is over."""
        if index in self.limits.after:
            self.keep(self.limits.after[index])

    def entered(self, index: int) -> None:
        """The backward of a block call begins."""
        if index in self.limits.before:
            self.keep(self.limits.before[index])

    def keep(self, growth: int) -> None:
        """Make room for ``growth`` bytes: hand back what is free, and if that is not enough, whatever gets free."""
        if self._meter is None:
            return
        held, budget = self._meter.now(), self.limits.budget
        if held + growth > budget:
            self._meter.release()
            held = self._meter.now()
        eager = held + growth > budget
        if eager != self._eager:
            self._eager = eager and host.release_eagerly(on=True)
            if not eager:
                host.release_eagerly(on=False)

    def relax(self) -> None:
        """Nothing near the budget comes next."""
        if self._eager:
            self._eager = False
            host.release_eagerly(on=False)


def limits(profile: StepProfile, policies: Sequence[Policy], indices: Sequence[int], budget: int) -> Limits:
    """What the events up to the next moment add to what is held at each.

    Args:
        profile: The step.
        policies: Of its calls.
        indices: For each call of the profile its index among the block calls of the step.
        budget: Bytes.
    """
    simulation = simulate_policies(profile, policies)
    if simulation.peak_bytes < NEAR_SHARE * budget or not profile.events:
        return Limits()
    after: dict[int, int] = {}
    before: dict[int, int] = {}
    kept = simulation.kept_bytes
    held = profile.events[0].outside_bytes
    growth = 0
    growths, moment = after, -1
    gross: dict[Policy, int] = {}
    for event, (_, size) in zip(profile.events, simulation.events, strict=True):
        own = kept[event.call] if event.call is not None else 0
        own += event.outside_bytes + sum(kept[call] for call in event.live_calls)
        if event.kind == "backward" and event.call is not None:
            growths[moment] = growth
            growths, moment, held, growth = before, indices[event.call], own, 0
            policy = policies[event.call]
            if policy not in gross:
                gross[policy] = working_set(profile.programs[policy.program], policy).growth_bytes
            growth = gross[policy]
        growth = max(growth, int(SCATTER * (size - held)))
        if event.kind == "forward" and event.call is not None:
            growths[moment] = growth
            growths, moment, held, growth = after, indices[event.call], own, 0
    growths[moment] = growth
    start = after.pop(-1)
    return Limits(budget, start, after, before)
