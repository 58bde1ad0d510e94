"""By how much memory may grow between the moments of a planned step, so that the step stays within its budget (CPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from memfit.profiles import StepProfile
from memfit.solver.peak import Simulation

NEAR_SHARE = 0.6
"""Where the peak stays under this share of the budget, freed memory may lie where it is: glibc has kept half as much as
a process held otherwise."""

Moment = tuple[Literal["start", "after", "before"], int]
"""Before the first block call; after the forward of one, or before its backward, by its index in the step."""
START: Moment = ("start", 0)


@dataclass(frozen=True, slots=True)
class Limits:
    """By how much memory grows from one moment of a step to the next, in bytes.

    Attributes:
        budget: What may be held at most.
        growths: By moment; where there is nothing to mind, none.
    """

    budget: int = 0
    growths: dict[Moment, int] = field(default_factory=dict)


def limits(profile: StepProfile, simulation: Simulation, indices: Sequence[int], budget: int) -> Limits:
    """What the events up to the next moment add to what is held at each.

    Args:
        profile: The step.
        simulation: Of it, under the plan.
        indices: For each call of the profile its index among the block calls of the step.
        budget: Bytes.
    """
    if simulation.peak_bytes < NEAR_SHARE * budget or not profile.events:
        return Limits(budget)
    growths: dict[Moment, int] = {}
    kept = simulation.kept_bytes
    held = profile.events[0].outside_bytes
    growth = 0
    moment = START
    for event, (_, size) in zip(profile.events, simulation.events, strict=True):
        own = kept[event.call] if event.call is not None else 0
        own += event.outside_bytes + sum(kept[call] for call in event.live_calls)
        if event.kind == "backward" and event.call is not None:
            growths[moment] = growth
            moment, held, growth = ("before", indices[event.call]), own, 0
        growth = max(growth, size - held)
        if event.kind == "forward" and event.call is not None:
            growths[moment] = growth
            moment, held, growth = ("after", indices[event.call]), own, 0
    growths[moment] = growth
    return Limits(budget, growths)
