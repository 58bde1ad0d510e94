"""What people switch on today, as plans with names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from memfit.plans import Plan
from memfit.profiles import StepProfile
from memfit.solver.planner import switched


def todays(profile: StepProfile, fits: Callable[[Plan], bool], *, parts: bool = True) -> Iterator[tuple[str, Plan]]:
    """Nothing, full and selective checkpointing, and every n-th layer: the largest n that fits, or 2.

    Args:
        profile: What a step costs.
        fits: Whether a plan is small enough.
        parts: Whether a block may keep a part of what it saves.
    """
    yield "nothing", switched(profile, policy="plain")
    yield "full checkpointing", switched(profile, policy="full")
    if parts:
        yield "selective checkpointing", switched(profile, policy="selective")
    best: tuple[str, Plan] | None = None
    for every in range(2, len({call.name for call in profile.calls}) + 1):
        plan = switched(profile, every_n_layers=every)
        if best is not None and not fits(plan):
            break
        best = every_nth(every), plan
    if best is not None:
        yield best


def every_nth(number: int) -> str:
    """What people call it: ``every 2nd layer``."""
    return f"every {_ordinal(number)} layer"


def _ordinal(number: int) -> str:
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
