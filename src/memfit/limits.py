"""When freed memory has to be handed back so that a planned step stays within its budget (CPU).

What an allocator holds but nobody uses is part of the resident set. Most of it serves the next allocation of its size;
what is too scattered for that lies there while memory grows elsewhere. Handing it back costs page faults, so it is done
only where the next events could not grow by all that they need and stay within the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from memfit.profiles import StepProfile
from memfit.solver.peak import Simulation

NEAR_SHARE = 0.8
"""Where the peak stays under this share of the budget, freed memory may lie where it is."""


@dataclass(slots=True)
class Limits:
    """The most that may be resident at moments of a step, in bytes; beyond it freed memory is handed back.

    Attributes:
        start: Before the first block call; ``None``: never mind.
        after: After the forward of a block call, by its index in the step.
        before: Before the backward of a block call.
    """

    start: int | None = None
    after: dict[int, int] = field(default_factory=dict)
    before: dict[int, int] = field(default_factory=dict)


def limits(profile: StepProfile, simulation: Simulation, indices: Sequence[int], budget: int) -> Limits:
    """The budget, less what the events up to the next such moment add to what is held then.

    Args:
        profile: The step.
        simulation: Of the plan in force.
        indices: For each call of the profile its index among the block calls of the step.
        budget: Bytes.
    """
    found = Limits()
    if simulation.peak_bytes < NEAR_SHARE * budget or not profile.events:
        return found
    kept = simulation.kept_bytes
    held = profile.events[0].outside_bytes
    growth = 0
    moment: tuple[str, int] = ("start", 0)

    def close() -> None:
        kind, index = moment
        if kind == "start":
            found.start = budget - growth
        else:
            (found.after if kind == "after" else found.before)[index] = budget - growth

    for event, (_, size) in zip(profile.events, simulation.events, strict=True):
        own = kept[event.call] if event.call is not None else 0
        own += event.outside_bytes + sum(kept[call] for call in event.live_calls)
        if event.kind == "backward" and event.call is not None:
            close()
            moment, held, growth = ("before", indices[event.call]), own, 0
        growth = max(growth, size - held)
        if event.kind == "forward" and event.call is not None:
            close()
            moment, held, growth = ("after", indices[event.call]), own, 0
    close()
    return found
