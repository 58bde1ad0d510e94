"""Hidden-state offload: full activation checkpointing, and what each block keeps of its input is moved to host memory.

    peak = that of full checkpointing less the inputs that are on the host at that moment
    time = that of full checkpointing and, for every block in either direction, what its copy takes longer than the
           computation that it runs beside

Nothing of this is Memfit's own: it is what others' switches come to, for comparison.

Source:
    Unsloth's `use_gradient_checkpointing="unsloth"`, TRL's and torchtune's `OffloadActivations` around checkpointing,
    axolotl's `activation_offloading: hidden_states`, transformers' `offload`, read in their sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memfit.plans import Plan, Policy
from memfit.profiles import StepEvent, StepProfile
from memfit.solver.peak import simulate_policies
from memfit.solver.planner import make_plan
from memfit.solver.special import full_policy
from memfit.solver.working_set import working_set

IN_FLIGHT = 2
"""Inputs on the device at once: the one in use, and one that is being copied."""


def offload_plan(
    profile: StepProfile, *, bytes_per_second: float, in_flight: int = IN_FLIGHT, overlaps: bool = True
) -> Plan | None:
    """The plan of full checkpointing, with the peak and the seconds that it has where inputs are moved.

    Args:
        profile: What a step costs.
        bytes_per_second: That a copy to or from the host reaches.
        in_flight: Inputs that are on the device at once, that of the running block among them.
        overlaps: Whether copies run beside computation; else the step waits for each.

    Returns:
        ``None`` where no block keeps anything of its input.
    """
    policies = [full_policy(profile.programs[call.program]) for call in profile.calls]
    moved = [_input_bytes(profile, policy) for policy in policies]
    if not any(moved):
        return None
    events = tuple(
        replace(event, outside_bytes=event.outside_bytes - _away(event, moved, in_flight)) for event in profile.events
    )
    found = simulate_policies(replace(profile, events=events), policies)
    waits = 0.0
    for size, policy in zip(moved, policies, strict=True):
        program, seconds = profile.programs[policy.program], size / bytes_per_second
        beside = program.forward_seconds if overlaps else 0.0
        waits += max(0.0, seconds - beside)
        beside = program.backward_seconds + working_set(program, policy).recompute_seconds if overlaps else 0.0
        waits += max(0.0, seconds - beside)
    return replace(
        make_plan(profile, policies, budget_bytes=None),
        predicted_peak_bytes=found.peak_bytes,
        peak_event=found.event,
        recompute_seconds=found.recompute_seconds + waits,
    )


def _input_bytes(profile: StepProfile, policy: Policy) -> int:
    """What a call keeps of its first input that costs anything: the hidden states."""
    nodes = profile.programs[policy.program].nodes
    return next((nodes[n].keep_bytes or 0 for n in policy.kept if nodes[n].kind == "input" and nodes[n].keep_bytes), 0)


def _away(event: StepEvent, moved: Sequence[int], in_flight: int) -> int:
    """Bytes of inputs that are on the host at an event; the latest are still, or again, on the device."""
    here = max(0, in_flight - (event.call is not None))
    order = sorted(event.live_calls)
    return sum(moved[call] for call in order[: max(0, len(order) - here)])
