"""Peak memory of a training step, defined once: solver, report and tests all call this.

    peak = max over the events of a step of
           (what lies outside the blocks + what live frames hold + the event's working set)

The working set of a forward pass is the program's own, whatever the policy, because saved tensors stay parked until it
ends; that of a backward pass depends on the policy (`working_set`); events outside the blocks have none of their own.
Where a call's input is dropped and comes back through the calls before it, its backward pass also needs what their
recipes need at that moment (`links`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memfit.errors import PlanError
from memfit.plans import Plan, Policy
from memfit.profiles import StepEvent, StepProfile
from memfit.solver.links import restored
from memfit.solver.working_set import WorkingSet, working_set


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What a step needs, event by event.

    Attributes:
        peak_bytes: Highest use of memory.
        event: Name of the event that owns it; the first one, if several do.
        events: Name and bytes of every event, in time order.
        recompute_seconds: Time that recomputation adds to the step.
        kept_bytes: What each call's frame holds from its forward to its backward pass, by call.
    """

    peak_bytes: int
    event: str
    events: tuple[tuple[str, int], ...]
    recompute_seconds: float
    kept_bytes: tuple[int, ...]


def event_bytes(profile: StepProfile, event: StepEvent, kept: Sequence[int], working: Sequence[int]) -> int:
    """Memory in use at one event: the definition.

    Args:
        profile: What the step costs.
        event: One of its events.
        kept: Bytes that the frame of each call holds, by call.
        working: Bytes that the backward pass of each call needs, its own kept bytes included, by call.
    """
    total = event.outside_bytes + sum(kept[call] for call in event.live_calls)
    if event.call is not None:
        if event.kind == "forward":
            total += profile.programs[profile.calls[event.call].program].forward_bytes
        elif event.kind == "backward":
            total += working[event.call]
    return total


def simulate(profile: StepProfile, plan: Plan) -> Simulation:
    """Predict the memory of every event of a step under a plan.

    Raises:
        PlanError: The plan is for other block calls, or for other programs, than the profile.
    """
    if len(plan.calls) != len(profile.calls):
        raise PlanError(
            f"The plan has {len(plan.calls)} block calls and the step has {len(profile.calls)}. "
            "Make the plan again with `memfit plan`."
        )
    for made, call in zip(plan.calls, profile.calls, strict=True):
        if made.program != call.program:
            raise PlanError(
                f"The plan expects program `{made.program[:40]}` of `{call.name}`, which runs `{call.program[:40]}`. "
                "Make the plan again with `memfit plan`."
            )
    return simulate_policies(profile, [plan.policy(number) for number in range(len(plan.calls))])


def simulate_policies(profile: StepProfile, policies: Sequence[Policy]) -> Simulation:
    """As `simulate`, from one policy per block call.

    Raises:
        PlanError: A policy drops an input that the call before does not bring back.
    """
    walked: dict[Policy, WorkingSet] = {}
    for policy in policies:
        if policy not in walked:
            walked[policy] = working_set(profile.programs[policy.program], policy)
    sets = [walked[policy] for policy in policies]
    if any(policy.linked is not None for policy in policies):
        for place, source in enumerate(restored(profile, policies)):
            if source is not None:
                sets[place] = with_link(sets[place], seconds=source.seconds, peak_bytes=source.peak_bytes)
    return simulate_sets(profile, sets)


def with_link(walked: WorkingSet, *, seconds: float, peak_bytes: int) -> WorkingSet:
    """The working set of a call whose linked input takes so much to bring back."""
    if walked.link_bytes is None:
        return walked
    return replace(
        walked,
        peak_bytes=max(walked.peak_bytes, walked.link_bytes + peak_bytes),
        recompute_seconds=walked.recompute_seconds + seconds,
    )


def simulate_sets(profile: StepProfile, sets: Sequence[WorkingSet]) -> Simulation:
    """As `simulate`, from the working set of each block call."""
    kept = [each.kept_bytes for each in sets]
    working = [each.peak_bytes for each in sets]
    events = tuple((event.name, event_bytes(profile, event, kept, working)) for event in profile.events)
    name, peak = max(events, key=lambda event: event[1], default=("step", 0))
    return Simulation(
        peak_bytes=peak,
        event=name,
        events=events,
        recompute_seconds=sum(each.recompute_seconds for each in sets),
        kept_bytes=tuple(kept),
    )
