"""From the calls of a rehearsed step to what the solver and reports take."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from memfit.costs import profile_program
from memfit.links import link_of
from memfit.narrowing import NarrowSeconds
from memfit.profiler import CallReading
from memfit.profiles import ProgramProfile, StepProfile
from memfit.simulation.call import Call
from memfit.simulation.doubles import Template
from memfit.simulation.whole import whole_profile

Held = tuple[frozenset[int], frozenset[int]]
"""Nodes of a program that something outside its blocks keeps alive, and inputs that nothing else does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What a step showed.

    Attributes:
        profile: The solver's input.
        op_flops: Of each op of each program.
        parameter_bytes, state_bytes: Of the model, and of its optimizer once that has stepped.
        buffer_bytes: Of the model's buffers and of the batch.
        forward_flops, backward_flops: Of one micro-batch, nothing recomputed.
        outside_flops: Of them, what lies behind the last block: the head and the loss, forward and backward.
        step_seconds: Of the step that recomputes nothing.
        optimizer_seconds: Of which the optimizer's step.
        optimizer_bytes: What that had beside what was there before it, at its highest.
        held: By program, nodes that something outside its blocks keeps alive, and inputs that nothing else does.
        looked_at_values: Whether the model asked for values.
        draws: Whether blocks draw random numbers.
        gradients: At each event of the profile.
        forward_seconds: Of the forwards of one micro-batch.
        again_flops: Of forwards that are run again whatever the plan, where gradients are cached.
        times: How often a micro-batch runs what the profile shows: once, or for each sub-batch.
    """

    profile: StepProfile
    op_flops: dict[str, list[float]]
    parameter_bytes: int
    buffer_bytes: int
    state_bytes: int
    forward_flops: float
    backward_flops: float
    outside_flops: float
    step_seconds: float
    optimizer_seconds: float
    optimizer_bytes: int
    held: dict[str, Held]
    looked_at_values: bool
    draws: bool
    gradients: tuple[int, ...]
    forward_seconds: float
    again_flops: float = 0.0
    times: float = 1.0


def gradients_at_events(calls: Sequence[Call], profile: StepProfile, end: int, *, resident: bool) -> tuple[int, ...]:
    """What gradients take at each event of a profile.

    Args:
        calls: Of the step.
        profile: Of it.
        end: What they take in the end.
        resident: Whether they are there from the start.
    """
    order = sorted((c for c in calls if c.backward_start is not None), key=lambda c: c.backward_order)
    backward = iter([c.gradients for c in order if c.program is not None])
    found = []
    for event in profile.events:
        ended = event.name in ("optimizer", "end of backward")
        now = next(backward) if event.kind == "backward" else end if ended else 0
        found.append(end if resident else now)
    return tuple(found)


def spans(
    calls: Sequence[Call], templates: Mapping[Hashable, Sequence[Template]], ended: float, flops_ended: float
) -> dict[int, tuple[float, float, float]]:
    """By call: seconds of its backward; and what seconds and FLOPs the ledger lacks, as it was passed over.

    Args:
        calls: Of the step.
        templates: What calls were passed over for.
        ended, flops_ended: The ledger's seconds and FLOPs when the backward had ended.
    """
    order = sorted((c for c in calls if c.backward_start is not None), key=lambda c: c.backward_order)
    seconds = [*(call.backward_seconds for call in order[1:]), ended]
    flops = [*(call.backward_flops for call in order[1:]), flops_ended]
    took = {
        call.index: (end - call.backward_seconds, also - call.backward_flops)
        for call, end, also in zip(order, seconds, flops, strict=True)
    }
    found = {}
    for call in order:
        own = took[call.index]
        # The last of the recorded ones: the first also has what follows the blocks' backward in its span.
        like = own if call.template is None else took[templates[call.key][1].index]
        found[call.index] = like[0], like[0] - own[0], like[1] - own[1]
    return found


def outlived(call: Call) -> set[int]:
    """Nodes of what a block made and did not return that are alive when the backward begins: somebody holds them."""
    if call.program is None:
        return set()
    nodes = call.program.nodes
    taken = {node.storage for node in nodes if node.output or node.leaf is not None}
    return {number for number in call.alive if nodes[number].storage not in taken}


def held_nodes(calls: Sequence[Call]) -> dict[str, Held]:
    """By program, what something else keeps alive of each of its recorded calls, and which inputs nothing else does."""
    held: dict[str, Held] = {}
    for call in calls:
        if call.program is not None and call.template is None and call.backward_start is not None:
            alive = frozenset(outlived(call))
            owned = frozenset(
                number
                for number, node in enumerate(call.program.nodes)
                if node.leaf is not None and node.leaf.kind == "input" and node.leaf.index in call.owned
            )
            before = held.get(call.program.key, (alive, owned))
            held[call.program.key] = before[0] & alive, before[1] & owned
    return held


def profiles(
    calls: Sequence[Call],
    took: Mapping[int, tuple[float, float, float]],
    held: Mapping[str, Held],
    like: Rehearsed | None,
    narrow_seconds: NarrowSeconds,
) -> dict[str, ProgramProfile]:
    """Of every program: what it costs.

    Args:
        calls: Of the step.
        took: What `spans` gives.
        held: What `held_nodes` gives.
        like: A step of the same model on the same device.
        narrow_seconds: What narrowing a value costs on that device.
    """
    found: dict[str, ProgramProfile] = {}
    for call in calls:
        program = call.program
        if program is None or program.key in found or program.key not in held:
            continue
        if like is not None and like.held.get(program.key) == held[program.key]:
            found[program.key] = like.profile.programs[program.key]
            continue
        alive, owned = held[program.key]
        seconds = took[call.index][0]
        if call.whole:
            watched = [c.watch.events for c in calls if c.watch and c.program and c.program.key == program.key]
            found[program.key] = whole_profile(program, watched[-1], backward_seconds=seconds, held=alive, owned=owned)
            continue
        profile = profile_program(program, held=alive, owned=owned, narrow_seconds=narrow_seconds)
        found[program.key] = replace(profile, backward_seconds=seconds)
    return found


def read(call: Call, calls: Sequence[Call]) -> CallReading:
    """A call, as a live step would have read it."""
    link = None
    if call.program is not None and call.input is not None and not call.input_alive:
        argument, output = call.input
        before = calls[call.index - 1].program
        link = None if before is None else link_of(before, output, call.program, argument)
    return CallReading(
        call.name,
        mode="replay" if call.program is not None else "plain",
        program=call.program.key if call.program is not None else "",
        link=link,
        forward_start=call.forward_start,
        forward_peak=call.forward_start,
        backward_start=call.backward_start,
        gradients=call.gradients,
        backward_order=call.backward_order,
    )
