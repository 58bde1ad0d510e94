"""A plan in force, and what its steps have shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from memfit.errors import MemfitError
from memfit.host import allocator
from memfit.plans import Plan
from memfit.profiler import Profiler
from memfit.profiles import StepProfile
from memfit.solver.peak import simulate

TRIM_SHARE = {"tcmalloc": 0.88, "jemalloc": 0.88, "glibc": 0.75}
"""Events above this share of the peak: before them freed memory is handed back. glibc hands nothing back by itself."""


class Removable(Protocol):
    """What can be taken off a model."""

    def remove(self) -> None:
        """Make the model exactly what it was."""


@contextmanager
def unfitted_on_error(handle: Removable) -> Iterator[None]:
    """A deliberate error leaves nothing half-applied: the model is unfitted before the error reaches its user."""
    try:
        yield
    except MemfitError:
        handle.remove()
        raise


class Fitted:
    """A plan in force for one sequence of block calls."""

    __slots__ = (
        "forward_bytes",
        "names",
        "peak",
        "plan",
        "policies",
        "profile",
        "profiler",
        "raw_peak",
        "stale",
        "state_reserved",
        "steps",
        "trims",
    )

    def __init__(
        self,
        plan: Plan,
        raw_peak: int,
        indices: list[int],
        profiler: Profiler,
        profile: StepProfile,
        state_reserved: bool,
    ) -> None:
        self.plan = plan
        self.raw_peak = raw_peak
        self.profiler = profiler
        self.profile = profile
        self.policies = {index: plan.policy(place) for place, index in enumerate(indices)}
        events = simulate(profile, plan).events
        self.trims = _trims(profile, events, indices)
        plain = {
            key: sum(n.storage_bytes for n in p.nodes if n.num_saved and n.kind == "computed")
            for key, p in profile.programs.items()
        }
        self.forward_bytes = {
            indices[event.call]: size + plain[profile.calls[event.call].program]
            for event, (_, size) in zip(profile.events, events, strict=True)
            if event.kind == "forward" and event.call is not None
        }
        self.names = {index: plan.calls[place].name for place, index in enumerate(indices)}
        self.stale = False
        self.peak = 0
        self.steps = 0
        self.state_reserved = state_reserved


def _trims(
    profile: StepProfile, events: Sequence[tuple[str, int]], indices: list[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """Before which events freed memory is handed back: those near the peak, where what lies free and scattered counts.

    Returns:
        Block calls after whose forward, and before whose backward.
    """
    limit = TRIM_SHARE.get(allocator(), 0.75) * max((size for _, size in events), default=0)
    after: set[int] = set()
    before: set[int] = set()
    last: int | None = None
    for event, (_, size) in zip(profile.events, events, strict=True):
        if size >= limit:
            if event.kind == "backward" and event.call is not None:
                before.add(indices[event.call])
            elif event.kind == "forward" and last is not None:
                after.add(indices[last])
            elif event.name == "loss" and indices:
                after.add(indices[-1])
        if event.kind == "forward":
            last = event.call
    return frozenset(after), frozenset(before)
