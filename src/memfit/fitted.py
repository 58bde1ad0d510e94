"""A plan in force, and what its steps have shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from memfit.entries import ProgramState
from memfit.errors import InfeasibleBudgetError, MemfitError
from memfit.limits import Limits, limits
from memfit.plans import Plan, Policy
from memfit.profiler import Profiler
from memfit.profiles import ProgramProfile, StepProfile
from memfit.ranks import Ranks
from memfit.runtime import Runtime
from memfit.solver.peak import simulate

MAX_SMALLER = 4096
"""Policies of smaller programs that one plan remembers."""


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


def saves_nothing(runtime: Runtime) -> bool:
    """Whether no block call of this step kept anything for a backward: only what comes after them trains."""
    states = [runtime.states.get(call.program_key) for call in runtime.calls]
    return bool(states) and all(state is not None and not state.program.saved for state in states)


class Fitted:
    """A plan in force for one sequence of block calls."""

    __slots__ = (
        "_shapes",
        "_smaller",
        "_versions",
        "derived",
        "forward_bytes",
        "indices",
        "limits",
        "names",
        "peak",
        "plan",
        "policies",
        "profile",
        "profiler",
        "raw_peak",
        "size",
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
        states: Mapping[str, ProgramState],
        *,
        derived: bool = False,
    ) -> None:
        """A plan for ``profile``.

        Args:
            plan: The plan.
            raw_peak: What it is predicted to need, in bytes, the slack left out.
            indices: For each call of the profile its index among the block calls of the step.
            profiler: Of the step that was profiled.
            profile: What the step costs.
            state_reserved: Whether the optimizer's state is yet to be born.
            limit: Bytes within which the step must stay, if there are any.
            states: The programs, as they are now.
            derived: Whether it was made from the profile of a step of larger shapes.
        """
        self.plan = plan
        self.indices = indices
        self.derived = derived
        self._versions = {key: states[key].version for key in profile.programs}
        self._shapes = {key: states[key].shape for key in profile.programs}
        self._smaller: dict[tuple[int, str, int], Policy | None] = {}
        self.size = sum(self._shapes[call.program].total for call in profile.calls)
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

    def hold(self, budget: int) -> None:
        """Keep steps within a budget, in bytes, that the plan was not made for."""
        self.limits = limits(self.profile, simulate(self.profile, self.plan), self.indices, budget)

    def policy_of(self, state: ProgramState, index: int, name: str, *, smaller: bool) -> Policy | None:
        """What it has block call ``index`` do, if that is ``name`` and runs the program, or a ``smaller`` one."""
        policy = self.policies.get(index)
        if policy is None or self.names[index] != name:
            return None
        if policy.program == state.key:
            return policy
        if not smaller:
            return None
        key = (index, state.key, state.version)
        if key not in self._smaller:
            if len(self._smaller) >= MAX_SMALLER:
                self._smaller.clear()
            covers = self._shapes[policy.program].covers(state.shape)
            self._smaller[key] = replace(policy, program=state.key) if covers else None
        return self._smaller[key]

    def takes(self, given: list[tuple[int, ...]], name: str) -> bool:
        """Whether a step whose first block call is given tensors of these sizes is likely to be a smaller one."""
        policy = self.policies.get(0)
        return policy is not None and self.names[0] == name and self._shapes[policy.program].takes(given)

    def share(self, sequence: Sequence[tuple[str, str]], states: Mapping[str, ProgramState]) -> float:
        """How large a smaller step of these calls is, against the one that was planned; 0 if the calls are others."""
        own = [sequence[index] if index < len(sequence) else ("", "") for index in self.indices]
        if any(
            key not in states or name != call.name for (name, key), call in zip(own, self.profile.calls, strict=True)
        ):
            return 0.0
        return sum(states[key].shape.total for _, key in own) / max(1, self.size)

    def resized(self, sequence: Sequence[tuple[str, str]], programs: Mapping[str, ProgramProfile]) -> StepProfile:
        """What a smaller step costs at most, of these programs: outside of blocks as much as the larger one."""
        keys = [sequence[index][1] for index in self.indices]
        calls = tuple(replace(call, program=key) for call, key in zip(self.profile.calls, keys, strict=True))
        return replace(self.profile, programs={key: programs[key] for key in sorted(set(keys))}, calls=calls)

    def is_outdated(self, states: Mapping[str, ProgramState]) -> bool:
        """Whether its programs have shown more since: values that prove themselves, are held anyway, or differ."""
        return any(key in states and states[key].version != version for key, version in self._versions.items())
