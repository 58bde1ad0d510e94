"""A plan in force, and what its steps have shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from memfit.entries import ProgramState
from memfit.errors import InfeasibleBudgetError, MemfitError
from memfit.limits import Limits, limits
from memfit.plans import Plan
from memfit.profiler import Profiler
from memfit.profiles import StepProfile
from memfit.ranks import Ranks
from memfit.runtime import Runtime
from memfit.solver.peak import simulate


class Removable(Protocol):
    """What can be taken off a model."""

    runtime: Runtime
    ranks: Ranks

    def remove(self) -> None:
        """Make the model exactly what it was."""


@contextmanager
def unfitted_on_error(handle: Removable) -> Iterator[None]:
    """A deliberate error leaves nothing half-applied: the model is unfitted before the error reaches its user."""
    try:
        yield
    except InfeasibleBudgetError:
        if not _run_whole(handle.runtime, handle.ranks):
            handle.remove()
            raise
    except MemfitError:
        handle.remove()
        raise


def _run_whole(runtime: Runtime, ranks: Ranks) -> bool:
    """No plan fits: is there another way to run the blocks, on all ranks? See NOTE [Partitioned parameters]."""
    blocks = [block for block in runtime.blocks if block.partitioned]
    if runtime.whole or not blocks or (ranks.ranks and not ranks.refused):
        return False
    ranks.decide_again()
    runtime.whole = True
    for block in blocks:
        block.entries.clear()
        if block.mode == "plain":
            block.mode, block.reason = "replay", ""
    runtime.note("whole", "the budget is too small for plans that gather no parameters: blocks run again as a whole")
    return True


class Fitted:
    """A plan in force for one sequence of block calls."""

    __slots__ = (
        "_versions",
        "forward_bytes",
        "limits",
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
    )

    def __init__(
        self,
        plan: Plan,
        raw_peak: int,
        indices: list[int],
        profiler: Profiler,
        profile: StepProfile,
        state_reserved: bool,
        limit: int | None,
        versions: Mapping[str, int],
    ) -> None:
        """A plan for ``profile`` that must stay within ``limit`` bytes, if there is one; of these program versions."""
        self.plan = plan
        self._versions = dict(versions)
        self.raw_peak = raw_peak
        self.profiler = profiler
        self.profile = profile
        self.policies = {index: plan.policy(place) for place, index in enumerate(indices)}
        simulation = simulate(profile, plan)
        events = simulation.events
        self.limits = limits(profile, simulation, indices, limit) if limit is not None else Limits()
        plain = {
            key: sum(n.storage_bytes for n in p.nodes if n.num_saved and n.kind == "computed")
            for key, p in profile.programs.items()
        }
        self.forward_bytes = {
            indices[event.call]: (size, plain[profile.calls[event.call].program])
            for event, (_, size) in zip(profile.events, events, strict=True)
            if event.kind == "forward" and event.call is not None
        }
        self.names = {index: plan.calls[place].name for place, index in enumerate(indices)}
        self.stale = False
        self.peak = 0
        self.steps = 0
        self.state_reserved = state_reserved

    def is_outdated(self, states: Mapping[str, ProgramState]) -> bool:
        """Whether its programs have shown more since: values that prove themselves, are held anyway, or differ."""
        return any(key in states and states[key].version != version for key, version in self._versions.items())
