"""Which frames live at the same time: nested lifetimes make a step a chain, others do not.

In a chain the calls have an order such that at every event the live frames are the first few of them, and a backward
event belongs to the call after those. Then the only state is how many bytes the first few hold. One forward and
backward pass is a chain, however its blocks are called; gradient accumulation is one chain per micro-batch.

Calls with a single option are no choice: what they hold counts as fixed, so that a frozen block, whose backward never
comes, does not cross the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memfit.profiles import StepEvent, StepProfile
from memfit.solver.frontier import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Calls whose lifetimes are nested, and what every event needs beside their kept bytes.

    With K_i the kept bytes of the first i calls and W the working set of a call's option, all in bytes:
    ``K_i + need[i] <= budget``, and ``K_i + own_need[i] + W <= budget`` for the call at place i.

    Attributes:
        calls: Indices of block calls, outermost lifetime first.
        need: One for every number of live calls, 0 to all; ``None``: no such event.
        own_need: One for every call; ``None``: it has no backward event.
    """

    calls: tuple[int, ...]
    need: tuple[int | None, ...]
    own_need: tuple[int | None, ...]


def fixed_bytes(profile: StepProfile, event: StepEvent) -> int:
    """What an event needs whatever the plan: what lies outside the blocks, and a forward pass's own working set."""
    if event.kind == "forward" and event.call is not None:
        return event.outside_bytes + profile.programs[profile.calls[event.call].program].forward_bytes
    return event.outside_bytes


def own_call(event: StepEvent) -> int | None:
    """The call whose working set depends on the plan at this event."""
    return event.call if event.kind == "backward" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """A step whose lifetimes are nested.

    Attributes:
        chains: They share no event.
        static_bytes: The highest need of the events at which nothing lives that a plan changes; they are in no chain.
    """

    chains: tuple[Chain, ...]
    static_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    """An event, without what is no choice."""

    live: frozenset[int]
    own: int | None
    fixed: int


def nested(profile: StepProfile, options: Sequence[Sequence[Option]]) -> Nested | None:
    """The step as chains, or ``None`` if lifetimes cross.

    Args:
        profile: The step.
        options: Of each call.
    """
    moments = [_moment(profile, event, options) for event in profile.events]
    open_calls = [call for call, choices in enumerate(options) if len(choices) > 1]
    found = []
    for calls in _together(open_calls, moments):
        members = set(calls)
        chain = _chain(calls, [m for m in moments if m.live & members or m.own in members])
        if chain is None:
            return None
        found.append(chain)
    alone = [moment.fixed for moment in moments if not moment.live and moment.own is None]
    return Nested(chains=tuple(found), static_bytes=max(alone, default=0))


def _moment(profile: StepProfile, event: StepEvent, options: Sequence[Sequence[Option]]) -> _Moment:
    fixed = fixed_bytes(profile, event)
    fixed += sum(options[call][0].kept_bytes for call in event.live_calls if len(options[call]) == 1)
    own = own_call(event)
    if own is not None and len(options[own]) == 1:
        fixed += options[own][0].working_bytes
        own = None
    return _Moment(
        live=frozenset(call for call in event.live_calls if len(options[call]) > 1),
        own=own,
        fixed=fixed,
    )


def _together(open_calls: list[int], moments: list[_Moment]) -> list[list[int]]:
    """Calls in sets that no event crosses, each ascending."""
    owner = {call: call for call in open_calls}

    def find(call: int) -> int:
        while owner[call] != call:
            owner[call] = owner[owner[call]]
            call = owner[call]
        return call

    for moment in moments:
        calls = [*moment.live, *([] if moment.own is None else [moment.own])]
        for call in calls[1:]:
            owner[find(call)] = find(calls[0])
    sets: dict[int, list[int]] = {}
    for call in open_calls:
        sets.setdefault(find(call), []).append(call)
    return list(sets.values())


def _chain(calls: list[int], moments: list[_Moment]) -> Chain | None:
    lives = dict.fromkeys(calls, 0)
    for moment in moments:
        for call in moment.live:
            lives[call] += 1
    order = sorted(calls, key=lambda call: (-lives[call], call))
    place = {call: number for number, call in enumerate(order)}
    need: list[int | None] = [None] * (len(order) + 1)
    own_need: list[int | None] = [None] * len(order)
    for moment in moments:
        live = len(moment.live)
        if any(place[call] >= live for call in moment.live):
            return None
        if moment.own is None:
            need[live] = _more(need[live], moment.fixed)
        elif place[moment.own] == live:
            own_need[live] = _more(own_need[live], moment.fixed)
        else:
            return None
    return Chain(calls=tuple(order), need=tuple(need), own_need=tuple(own_need))


def _more(known: int | None, new: int) -> int:
    return new if known is None else max(known, new)
