"""A plan in force, and what its steps have shown."""

from __future__ import annotations

from memfit.limits import limits
from memfit.plans import Plan
from memfit.profiler import Profiler
from memfit.profiles import StepProfile
from memfit.solver.peak import simulate


class Fitted:
    """A plan in force for one sequence of block calls."""

    __slots__ = (
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
    ) -> None:
        self.plan = plan
        self.raw_peak = raw_peak
        self.profiler = profiler
        self.profile = profile
        self.policies = {index: plan.policy(place) for place, index in enumerate(indices)}
        simulation = simulate(profile, plan)
        events = simulation.events
        budget = plan.budget_bytes if plan.budget_bytes is not None else plan.predicted_peak_bytes
        self.limits = limits(profile, simulation, indices, budget)
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
