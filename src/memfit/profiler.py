"""Profile a live training step: memory at every block boundary, counted from outside.

While a step is profiled, freed memory is handed back at each boundary of a block call, and between block forwards at
once, so that what the process holds is what is alive. From that and what the frames are known to hold follows what lies
*outside* the blocks at each moment: weights, gradients born so far, optimizer state, logits, libraries. It is measured,
not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from memfit.errors import PlanError
from memfit.links import is_held_elsewhere
from memfit.memory import Meter
from memfit.profiles import BlockCall, Link, ProgramProfile, StepEvent, StepProfile
from memfit.solver.working_set import kept_bytes, working_set

if TYPE_CHECKING:
    from memfit.calls import Call
    from memfit.links import Tie
    from memfit.plans import Policy


@dataclass(slots=True)
class CallReading:
    """What was read around one block call, in bytes."""

    name: str
    mode: str = ""
    program: str = ""
    policy: Policy | None = None
    tie: Tie | None = None
    link: Link | None = None
    forward_start: int = 0
    forward_peak: int = 0
    backward_start: int | None = None
    backward_peak: int | None = None
    gradients: int = 0
    backward_order: int = -1


@dataclass(slots=True)
class Reading:
    """A profiled step.

    Attributes:
        start_bytes: Held when it began, gradients that were there included.
        start_gradients: Of which gradients.
        start_state: Of which optimizer state.
        loss_peak: Highest between the last forward and the first backward of a block.
        end_peak: Highest since the last block's backward began.
        optimizer_peak: Highest around the optimizer's step, if one ended within the reading.
        optimizer_state: Its state after that step.
        gradients_end: Of gradients, when the backward had ended.
        end_bytes: Held then.
        unseen: By program, what its backwards needed beyond their working sets, once that has been found out.
    """

    start_bytes: int
    start_gradients: int
    start_state: int
    calls: list[CallReading] = field(default_factory=list)
    loss_peak: int = 0
    end_peak: int = 0
    optimizer_peak: int | None = None
    optimizer_state: int = 0
    gradients_end: int = 0
    end_bytes: int = 0
    unseen: dict[str, int] | None = None


class Profiler:
    """Listens to the runtime during one step."""

    def __init__(self, meter: Meter, gradients: Callable[[], int], state: Callable[[], int]) -> None:
        """Begin a reading.

        Args:
            meter: Of the model's device.
            gradients: Bytes of the model's gradients now.
            state: Bytes of the optimizer's state now.
        """
        self._meter = meter
        self._gradients = gradients
        self._num_backward = 0
        self._last: CallReading | None = None
        self._passes: set[int] = set()
        self._open: dict[Call, CallReading] = {}
        self.reading = Reading(start_bytes=self._settled(), start_gradients=gradients(), start_state=state())
        meter.reset_peak()

    def _settled(self) -> int:
        if self._meter.device.type == "cpu":
            self._meter.release()  # elsewhere what is free does not count
        return self._meter.allocated()

    def _peak(self) -> int:
        return self._meter.allocated_peak()

    def block_entered(self, call: Call) -> None:
        """A block's forward begins."""
        read = self._open[call] = CallReading(call.block.name, forward_start=self._settled())
        self.reading.calls.append(read)
        self._meter.show_what_lives(False)  # ops are timed here: what they allocate should be warm
        self._meter.reset_peak()

    def block_left(self, call: Call) -> None:
        """A block's forward has ended."""
        read = self._open.pop(call, None)
        if read is None:
            return  # it had begun, in another thread, when the reading did
        read.forward_peak = self._peak()
        read.mode, read.program, read.policy, read.tie = call.mode, call.program_key, call.policy, call.tie
        self._settled()
        self._meter.show_what_lives(True)
        self._meter.reset_peak()

    def backward_entered(self, index: int) -> None:
        """The first saved tensor of a block call was asked for."""
        task = torch._C._current_graph_task_id()
        if task != -1 and task not in self._passes:
            self._passes.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._passes.discard(task))
        if index >= len(self.reading.calls) or self.reading.calls[index].backward_start is not None:
            return
        if self._last is None:
            self.reading.loss_peak = self._peak()
            self._settle_links()
        else:
            self._last.backward_peak = self._peak()
        read = self._last = self.reading.calls[index]
        read.backward_order = self._num_backward
        self._num_backward += 1
        read.backward_start = self._settled()
        read.gradients = self._gradients()
        self._meter.reset_peak()

    def _settle_links(self) -> None:
        """Which calls take what the call before them returned, and alone keep it alive: every frame stands now."""
        for read in self.reading.calls:
            if read.tie is not None and not is_held_elsewhere(read.tie.holders):
                read.link = read.tie.link
            read.tie = None

    def backward_ended(self) -> None:
        """The optimizer is about to step, or the next forward to begin."""
        self._open.clear()  # forwards that failed
        self._meter.show_what_lives(False)
        if self.reading.end_peak == 0:
            self.reading.end_peak = self._peak()
            self.reading.gradients_end = self._gradients()
            self.reading.end_bytes = self._settled()
            self._meter.reset_peak()

    def optimizer_stepped(self, state: int) -> None:
        """The optimizer has stepped: its temporaries, and the state that was born, are in the peak."""
        self.reading.optimizer_peak = self._peak()
        self.reading.optimizer_state = state

    @property
    def complete(self) -> bool:
        """Whether forward and backward of at least one planned call were seen, and every backward came to its end."""
        return not self._passes and any(c.backward_start is not None for c in self.reading.calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """How the coming steps differ from the profiled one.

    Attributes:
        gradients_start: Bytes of gradients that are there before the forward.
        settled_bytes: Held between two steps, freed memory handed back.
        born_bytes: Optimizer state that exists (and is part of ``settled_bytes``).
        state_bytes: Optimizer state, born or reserved.
        gradients_end: Bytes of gradients when the backward has ended.
    """

    gradients_start: int
    settled_bytes: int
    born_bytes: int
    state_bytes: int
    gradients_end: int


def step_profile(
    reading: Reading, programs: dict[str, ProgramProfile], now: Now, *, device: torch.device, step_seconds: float
) -> tuple[StepProfile, list[int]]:
    """What a reading says about the coming steps.

    Returns:
        The profile, and for each of its calls the index of the block call in the step (calls that are not replayed are
        part of what lies outside).
    """
    replayed = [i for i, c in enumerate(reading.calls) if c.mode == "replay" and c.program in programs]
    place = {index: number for number, index in enumerate(replayed)}
    held = [
        kept_bytes(programs[c.program], c.policy) if i in place and c.policy is not None else 0
        for i, c in enumerate(reading.calls)
    ]
    state = max(0, now.state_bytes - reading.start_state)
    more = max(0, now.gradients_start - reading.start_gradients)
    events: list[StepEvent] = []
    before: list[int] = []
    base = reading.start_bytes + state + more
    for index, call in enumerate(reading.calls):
        live = tuple(place[i] for i in before if i in place)
        outside = max(call.forward_start - sum(held[i] for i in before) + state + more, 0)
        if index in place:
            events.append(
                StepEvent(
                    name=f"forward of {call.name}",
                    kind="forward",
                    call=place[index],
                    live_calls=live,
                    outside_bytes=outside,
                )
            )
        else:
            peak = max(call.forward_peak - sum(held[i] for i in before) + state + more, outside)
            events.append(
                StepEvent(name=f"forward of {call.name}", kind="outside", live_calls=live, outside_bytes=peak)
            )
        before.append(index)
    everything = tuple(range(len(replayed)))
    events.append(
        StepEvent(
            name="loss",
            kind="outside",
            live_calls=everything,
            outside_bytes=max(reading.loss_peak - sum(held) + state + more, base),
        )
    )
    order = sorted(
        (i for i, c in enumerate(reading.calls) if c.backward_start is not None),
        key=lambda i: reading.calls[i].backward_order,
    )
    gone: set[int] = set()
    if reading.unseen is None:
        reading.unseen = _unseen(reading, programs, replayed)
    # NOTE [Scattered pages]: a CPU allocator cannot hand back a page of which anything is in use. What it holds beyond
    # the tensors grows through a profiled step, is there for later allocations, and is gone when the step is over.
    over = reading.end_bytes - reading.gradients_end + now.gradients_start + now.born_bytes - reading.start_state
    scattered = max(0, over - now.settled_bytes) if reading.end_bytes else 0
    # NOTE [First times]: code and workspaces that a backward touches first grow the process for good, after the forward
    # and the loss of the profiled step were read.
    settled = (
        now.settled_bytes - (now.gradients_start - reading.start_gradients) - (now.born_bytes - reading.start_state)
    )
    if order:
        first = reading.calls[order[0]]
        assert first.backward_start is not None
        grown = max(0, settled - (first.backward_start - sum(held) - (first.gradients - reading.start_gradients)))
        events = [replace(event, outside_bytes=event.outside_bytes + grown) for event in events]
    for place_in_backward, index in enumerate(order):
        call = reading.calls[index]
        assert call.backward_start is not None
        alive = [i for i in range(len(reading.calls)) if i not in gone]
        born = max(0, call.gradients - reading.start_gradients)
        outside = call.backward_start - sum(held[i] for i in alive) + state + max(0, more - born)
        outside -= scattered * (place_in_backward + 1) // len(order)
        outside = max(outside, settled + born + state + max(0, more - born))
        live = tuple(place[i] for i in alive if i in place and i != index)
        if index in place:
            events.append(
                StepEvent(
                    name=f"backward of {call.name}",
                    kind="backward",
                    call=place[index],
                    live_calls=live,
                    outside_bytes=max(outside, 0) + reading.unseen.get(call.program, 0),
                )
            )
        gone.add(index)
    end = reading.end_peak - (held[order[-1]] if order else 0) + state
    if order and order[-1] not in place:
        events.append(StepEvent(name="end of backward", kind="outside", outside_bytes=max(end, 0)))
    if reading.optimizer_peak is not None:
        events.append(
            StepEvent(
                name="optimizer",
                kind="outside",
                outside_bytes=reading.optimizer_peak + max(0, more - reading.gradients_end),
            )
        )
    events.append(
        StepEvent(
            name="optimizer",
            kind="outside",
            outside_bytes=base - now.gradients_start + max(now.gradients_end, now.gradients_start),
        )
    )
    used = {reading.calls[i].program for i in replayed}
    calls = tuple(
        BlockCall(
            name=reading.calls[i].name,
            program=reading.calls[i].program,
            link=reading.calls[i].link if i - 1 in place else None,
        )
        for i in replayed
    )
    inside = sum(programs[c.program].forward_seconds + programs[c.program].backward_seconds for c in calls)
    profile = StepProfile(
        device=str(device),
        programs={key: programs[key] for key in sorted(used)},
        calls=calls,
        events=tuple(events),
        outside_seconds=max(0.0, step_seconds - inside),
    )
    return profile, replayed


def _unseen(reading: Reading, programs: dict[str, ProgramProfile], replayed: Iterable[int]) -> dict[str, int]:
    """By program, bytes by which backwards grew beyond their working sets: workspaces, and freed memory of other sizes.

    The median over the calls of a program: the first backward of a process also grows it for good.
    """
    beyond: dict[str, list[int]] = {}
    for index in replayed:
        call = reading.calls[index]
        if call.backward_start is None or call.backward_peak is None or call.policy is None:
            continue
        program = programs[call.program]
        try:
            expected = working_set(program, call.policy)
        except PlanError:
            continue  # another recording of the program has shown since that less can be brought back
        grown = call.backward_peak - call.backward_start - (expected.peak_bytes - expected.kept_bytes)
        beyond.setdefault(call.program, []).append(max(0, grown))
    return {key: sorted(values)[len(values) // 2] for key, values in beyond.items()}
