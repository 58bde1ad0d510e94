"""Between the blocks of a step that devices share, weights are gathered and gradients reduced: moments of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from memfit.profiles import ProgramProfile, StepEvent, StepProfile
from memfit.simulation.call import Call


def with_exchanges(
    profile: StepProfile,
    gradients: Sequence[int],
    calls: Sequence[Call],
    *,
    state: int,
    resident: int,
    end_peak: int,
) -> tuple[StepProfile, tuple[int, ...]]:
    """A profile with the moments between blocks, and the gradients at each of its events.

    Args:
        profile: Of the step.
        gradients: At each of its events, in bytes.
        calls: Of the step.
        state: Bytes of optimizer state, which the ledger has not seen before the optimizer's step.
        resident: Bytes of gradients that are there before the forward, which the ledger has not seen either.
        end_peak: The most bytes since the last block's backward had ended.
    """
    forward = iter(calls)
    order = sorted((c for c in calls if c.backward_start is not None), key=lambda c: c.backward_order)
    backward = iter(c for c in order if c.program is not None)
    found: list[tuple[StepEvent, int]] = []
    ended = False
    for event, size in zip(profile.events, gradients, strict=True):
        if event.name.startswith("forward of "):
            call = next(forward)
            peak = call.forward_peak + state + resident
            if peak > event.outside_bytes:
                found.append((_between(f"before the {event.name}", event.live_calls, peak), size))
            event = replace(event, outside_bytes=event.outside_bytes + call.forward_transient)
        elif event.kind == "backward" and event.call is not None:
            call = next(backward)
            peak = call.before_peak + state + max(0, resident - call.gradients)
            if call is not order[0] and peak > event.outside_bytes:
                live = tuple(sorted((*event.live_calls, event.call)))
                found.append((_between(f"before the {event.name}", live, peak), size))
            event = replace(event, outside_bytes=event.outside_bytes + call.transient)
        elif event.name in ("end of backward", "optimizer") and not ended:
            ended = True
            found.append((_between("end of backward", (), end_peak + state + max(0, resident - size)), size))
        found.append((event, size))
    kept = _needed(found)
    return replace(profile, events=tuple(event for event, _ in kept)), tuple(size for _, size in kept)


def without_gradients(profile: ProgramProfile, sizes: Sequence[int]) -> ProgramProfile:
    """A program whose gradients of parameters are taken away as they come.

    Args:
        profile: Of the program.
        sizes: Of those gradients, in bytes.
    """
    freed = {event.index for event in profile.timeline if event.kind == "free"}
    left = Counter(sizes)
    timeline = []
    for event in profile.timeline:
        timeline.append(event)
        if event.kind == "alloc" and event.index not in freed and left[event.size]:
            left[event.size] -= 1
            timeline.append(replace(event, kind="free"))
    return replace(profile, timeline=tuple(timeline))


def _between(name: str, live: tuple[int, ...], size: int) -> StepEvent:
    return StepEvent(name=name, kind="outside", live_calls=live, outside_bytes=size)


def _needed(found: list[tuple[StepEvent, int]]) -> list[tuple[StepEvent, int]]:
    """Without moments of the forward at which no more is there than at a later one, when more calls are alive."""
    most = 0
    kept = []
    loss = next(i for i, (event, _) in enumerate(found) if event.name == "loss")
    for number in range(len(found) - 1, -1, -1):
        event = found[number][0]
        if number <= loss and event.kind == "outside":
            if event.name.startswith("before the ") and event.outside_bytes <= most:
                continue
            most = max(most, event.outside_bytes)
        kept.append(found[number])
    return kept[::-1]


__all__ = ["with_exchanges", "without_gradients"]
