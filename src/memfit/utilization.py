"""How much a fitted model computes, how fast, and how much of the device's rate that is.

*Model FLOPs* are those of forward and backward, nothing recomputed; *hardware FLOPs* have what is recomputed too. Their
shares of what the device could do in the same time are the model and the hardware FLOP utilisation (MFU and HFU).

A forward is counted once for every geometry of its arguments; a step like that costs nothing from then on. All numbers
are of one device, and of a step as `StepClock` has it: from one forward after a backward to the next.

Source:
    Chowdhery et al. 2022, "PaLM", arXiv 2204.02311, appendix B, for MFU; Korthikanti et al. 2022, arXiv 2205.05198,
    section 6.3, for telling it from HFU. Differs: FLOPs are counted op by op, not taken from a formula.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from memfit import flops, hardware
from memfit.entries import ProgramState
from memfit.errors import MemfitError, PlanError
from memfit.flops import Count
from memfit.hardware import Hardware
from memfit.plans import Policy
from memfit.profiles import BlockCall, Link, OpCost, ProgramProfile, StepProfile
from memfit.runtime import Runtime
from memfit.signature import tensors_in
from memfit.solver.links import restored
from memfit.solver.working_set import recipe_ops

_TERA = 1e12
_KEPT = 64
_SHARE = 16
"""Of forwards, at most every n-th is counted, the first ones aside: lengths may change with every batch."""
_FIRST = 8
_MAX_GEOMETRIES = 4096


class Utilization:
    """Counts the forwards of one fitted model."""

    def __init__(self, runtime: Runtime, device: torch.device, *, counts: bool) -> None:
        """Nothing counted yet; ``counts``: whether that is possible (a compiled forward hides its ops)."""
        self._runtime = runtime
        self._device = device
        self._counts = counts
        self._known: dict[Any, tuple[Count, tuple[str, ...]]] = {}
        self._running = threading.local()
        self._num_counted = self._num_forwards = 0
        self._now: list[Count | None] = []
        self._undisturbed = True  # no forward of this step was counted while it ran
        self._last: list[Count | None] = []
        self._rates: list[float] = []

    # Forwards and steps

    def forward_begins(self, args: Any, kwargs: Any) -> None:
        """A training forward begins."""
        if not self._counts:
            return
        flops.end()
        key = _geometry(args, kwargs)
        self._running.key, self._running.first_call = key, len(self._runtime.calls)
        self._num_forwards += 1
        if key is None or key in self._known or self._num_counted > _FIRST + self._num_forwards // _SHARE:
            return
        self._num_counted += 1
        self._undisturbed = False
        flops.begin(self)

    def forward_ends(self, *, failed: bool) -> None:
        """It is over."""
        if not hasattr(self._running, "key"):
            return
        count, key, first_call = flops.end(), self._running.key, self._running.first_call
        del self._running.key
        if failed:
            return
        programs = tuple(call.program_key for call in self._runtime.calls[first_call:])
        if count is not None:
            if len(self._known) >= _MAX_GEOMETRIES:
                self._known.pop(next(iter(self._known)))
            self._known[key] = count, programs
        elif key in self._known:
            count, expected = self._known[key]
            if programs != expected:
                del self._known[key]  # something else than its arguments decides what it does
                count = None
        self._now.append(count if count is not None and count.exact else None)

    def plain_forward_begins(self) -> None:
        """A forward that trains nothing begins."""
        self._running.__dict__.pop("key", None)
        counter = flops.current()
        if counter is not None and counter.owner() is self:  # a KeyboardInterrupt ended the last forward
            flops.end()

    def step_ended(self, seconds: float | None) -> None:
        """A step is over; ``seconds``: what it took, if that is known."""
        self._last, self._now = self._now, []
        undisturbed, self._undisturbed = self._undisturbed, True
        work = _flops_of(self._last)
        if work is not None and seconds is not None and undisturbed:
            self._rates.append(work / seconds)
            del self._rates[:-_KEPT]

    def remove(self) -> None:
        """Leave nothing on the stack of modes."""
        self._counts = False
        flops.end()

    # Reading

    def summary(self, calls: Sequence[Mapping[str, Any]], states: Mapping[str, ProgramState]) -> dict[str, Any]:
        """The report's numbers, ``None`` where unknown.

        Args:
            calls: Block calls of the last step, as `describe` has them.
            states: The programs that they ran.
        """
        counts = self._last or self._now
        model = _flops_of(counts)
        again = None if model is None else _recomputed(calls, states, counts)
        rate = sorted(self._rates, reverse=True)[len(self._rates) // 2] if self._rates else None  # as `StepClock`
        share = None if model is None or again is None else (model + again) / model
        utilization = None
        entry = device_entry(self._device) if rate is not None else None
        if entry is not None and rate is not None and model is not None:
            utilization = rate * _ideal_seconds(counts, entry) / model
        return {
            "model_flops": None if model is None else round(model),
            "hardware_flops": None if model is None or again is None else round(model + again),
            "tflops_per_second": None if rate is None else rate / _TERA,
            "hardware_tflops_per_second": None if rate is None or share is None else rate * share / _TERA,
            "model_flop_utilization": utilization,
            "hardware_flop_utilization": None if utilization is None or share is None else utilization * share,
        }


def _geometry(args: Any, kwargs: Any) -> Any:
    """What tells the forwards that compute as much; ``None`` where arguments are beyond that."""
    try:
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors_in((args, kwargs)))
        hash(key)
    except (RuntimeError, TypeError):  # nested tensors, symbolic sizes, a mapping that holds itself
        return None
    return key


def device_entry(device: torch.device) -> Hardware | None:
    """The rates of a device: its entry, else the machine as it was calibrated; ``None`` where there is neither."""
    from memfit.calibration import device_name

    name = device_name(device)
    try:
        return hardware.find(name)
    except MemfitError:
        pass
    try:
        record = hardware.load_record()
    except MemfitError:
        return None
    if record is None or record.device != name:
        return None
    if device.type == "cpu" and record.num_threads != torch.get_num_threads():
        return None  # other threads reach other rates
    return record.hardware


def _flops_of(counts: Sequence[Count | None]) -> float | None:
    if not counts or None in counts:
        return None
    total = sum(count.flops for count in counts if count is not None)
    return total or None


def _ideal_seconds(counts: Iterable[Count | None], entry: Hardware) -> float:
    """What the FLOPs would take at the device's rates for their dtypes."""
    total = 0.0
    for count in counts:
        for by_dtype in (count.forward, count.backward) if count is not None else ():
            total += sum(work / _rate(entry, dtype) for dtype, work in by_dtype.items())
    return total


def _rate(entry: Hardware, dtype: torch.dtype) -> float:
    if dtype is torch.float32 and entry.backend == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return entry.matmul_flops_per_second.get("tf32", entry.flops_per_second("fp32"))
    return entry.flops_per_second(str(dtype))


def _recomputed(
    calls: Sequence[Mapping[str, Any]], states: Mapping[str, ProgramState], counts: Iterable[Count | None]
) -> float | None:
    """FLOPs that the plan of these calls runs again; ``None`` where a program is no longer known."""
    again = {call["name"] for call in calls if call["mode"] == "fallback"}
    total = sum(count.by_place.get(name, 0.0) for count in counts if count is not None for name in again)
    replayed = [call for call in calls if call["mode"] == "replay" and call["policy"] is not None]
    if any(call["program"] not in states for call in replayed):
        return None
    known = {key: _profile(states[key]) for key in {call["program"] for call in replayed}}
    programs = {key: program for key, program in known.items() if program is not None}
    if len(programs) < len(known):
        return None
    policies: list[Policy] = [call["policy"] for call in replayed]
    linked: list[BlockCall] = []
    for place, (call, policy) in enumerate(zip(replayed, policies, strict=True)):
        output = policies[place - 1].returned if place else None
        link = None if policy.linked is None or output is None else Link(input=policy.linked, output=output)
        linked.append(BlockCall(name=call["name"], program=call["program"], link=link))
    try:
        for policy in policies:
            program = programs[policy.program]
            total += sum(program.ops[number].seconds for number in recipe_ops(program, policy))
        step = StepProfile(device="", programs=programs, calls=tuple(linked), events=())
        total += sum(source.seconds for source in restored(step, policies) if source is not None)
    except (PlanError, KeyError):
        return None
    return total


def _profile(state: ProgramState) -> ProgramProfile | None:
    """A program on a device whose seconds are FLOPs; ``None`` where they are unknown."""
    program = state.program
    work = flops.program_flops(program)
    if work is None:
        return None
    ops = tuple(
        OpCost(
            name=str(op.func),
            seconds=seconds,
            inputs=op.inputs,
            outputs=tuple(node for _, node in op.outputs),
            recomputable=op.recomputable,
        )
        for op, seconds in zip(program.ops, work, strict=True)
    )
    return ProgramProfile(
        key=state.key,
        nodes=state.nodes,
        ops=ops,
        saved=tuple(saved.value.node for saved in program.saved),
        outputs=tuple(dict.fromkeys(value.node for value in program.outputs)),
        timeline=(),
        forward_seconds=sum(work),
        backward_seconds=0.0,
        forward_bytes=0,
    )
