"""The canary: compare a few elements of every recomputed value with what the forward saved (design, rule 4).

On the CPU that is done at once. On a device nothing is asked for an answer, which would wait for all work that it has
been given: what was sampled is compared at the end of the backward pass, all of it together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import torch

from memfit.bits import as_integers, hash_on_device, max_ulp
from memfit.programs import Value

NUM_SAMPLES = 24
FEW_ULP = 4.0
SMALL_BYTES = 4096

Pair = tuple[torch.Tensor, torch.Tensor]
"""What a value shows now, and what it showed in the forward."""

_WORDS: dict[int, Any] = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class HostProbe:
    """Samples one saved tensor in host memory. By address, words cost a fraction of a view and a comparison."""

    __slots__ = ("_dtype", "_room", "_span", "_step", "_word", "_words")

    def __init__(self, value: Value) -> None:
        """Of a value that lies on the CPU and is not empty."""
        size = value.dtype.itemsize
        word = next(w for w in (8, 4, 2, 1) if size % w == 0)
        length = _dense_run(value) * (size // word)
        self._step = max(length // NUM_SAMPLES, 1)
        self._span = min(length, self._step * (NUM_SAMPLES - 1) + 1)
        self._room = length - self._span + 1
        self._word = word
        self._words = _WORDS[word] * length
        self._dtype = value.dtype

    def take(self, tensor: torch.Tensor, turn: int) -> bytes:
        """The words of the ``turn``-th sample, spread over the tensor's memory."""
        offset = turn % self._room
        words = memoryview(self._words.from_address(tensor.data_ptr()))
        return words[offset : offset + self._span : self._step].tobytes()

    def distance(self, now: bytes, then: bytes) -> float:
        """Units in the last place between two samples."""
        is_word = self._dtype.is_floating_point and self._dtype.itemsize == self._word
        dtype = self._dtype if is_word else _INTEGERS[self._word]
        a, b = (torch.frombuffer(bytearray(words), dtype=dtype) for words in (now, then))
        return max_ulp(a, b)


class DeviceProbe:
    """Samples one saved tensor on its device, without a synchronization."""

    __slots__ = ("_room", "_step")

    def __init__(self, value: Value) -> None:
        """Of a value that is not empty."""
        self._step, self._room = pattern(value)

    def view(self, tensor: torch.Tensor, turn: int) -> torch.Tensor:
        """The ``turn``-th sample, spread over the tensor's memory."""
        return take(tensor, self._step, turn % self._room)


class Probes:
    """Where the canary samples the saved tensors that a policy drops."""

    __slots__ = ("device", "host")

    def __init__(self, saved: Iterable[tuple[int, Value, torch.device]]) -> None:
        """Of dropped saved tensors: their index, what they are, and where they lie."""
        self.host: dict[int, HostProbe] = {}
        self.device: dict[int, DeviceProbe] = {}
        for index, value, device in saved:
            if 0 in value.size:
                continue
            if device.type == "cpu":
                self.host[index] = HostProbe(value)
            else:
                self.device[index] = DeviceProbe(value)


def probes_of(tensors: dict[int, torch.Tensor]) -> Probes:
    """Probes of tensors that no recording describes."""
    values = {i: Value(-1, tuple(t.shape), t.stride(), 0, t.dtype) for i, t in tensors.items()}
    return Probes((i, value, tensors[i].device) for i, value in values.items())


class Samples:
    """What the saved tensors of one call looked like where the canary looks."""

    __slots__ = ("_hashes", "_probes", "_taken", "_turn")

    def __init__(self, probes: Probes, tensors: dict[int, torch.Tensor], turn: int, *, hashed: bool) -> None:
        """Take them from ``tensors``, by index; ``turn`` says where. If ``hashed``, all bits of each too."""
        self._hashes = {i: all_bits(tensor) for i, tensor in tensors.items()} if hashed else {}
        self._probes = probes
        self._turn = turn
        self._taken: dict[int, Any] = {i: probe.take(tensors[i], turn) for i, probe in probes.host.items()}
        if probes.device:
            groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
            for i in probes.device:
                groups.setdefault((tensors[i].dtype, tensors[i].device), []).append(i)
            for group in groups.values():
                rows = torch.stack([probes.device[i].view(tensors[i], turn) for i in group])
                self._taken.update(zip(group, rows.unbind(0), strict=True))

    def compare(self, index: int, value: torch.Tensor) -> float | list[Pair] | None:
        """Look at a recomputed value where it was sampled.

        Returns:
            Units in the last place by which a sample on the CPU differs, or what has still to be compared, if anything.
        """
        pairs: list[Pair] = []
        probe = self._probes.host.get(index)
        if probe is not None:
            now, then = probe.take(value, self._turn), self._taken[index]
            if now != then:
                return probe.distance(now, then)
        elif (there := self._probes.device.get(index)) is not None:
            pairs.append((there.view(value, self._turn).clone(), self._taken[index]))
        expected = self._hashes.get(index)
        if expected is not None:
            pairs.append((all_bits(value), expected))
        return pairs or None


class Doubts:
    """Pairs of what should be the same bits, on devices, until somebody wants to know."""

    __slots__ = ("_pairs", "_streams")

    def __init__(self) -> None:
        """None yet."""
        self._pairs: list[tuple[torch.Tensor, torch.Tensor, Callable[[float], None]]] = []
        self._streams: dict[int, torch.cuda.Stream] = {}

    def add(self, pair: Pair, judge: Callable[[float], None]) -> None:
        """One more; ``judge`` will be called with the distance in units in the last place, if the two differ."""
        self._pairs.append((*pair, judge))
        if pair[0].is_cuda and (index := pair[0].get_device()) not in self._streams:
            self._streams[index] = torch.cuda.current_stream(index)  # of the whole pass, see `memfit.streams`

    def settle(self) -> None:
        """Compare all, waiting once for each device. A judge hears of one difference and may raise."""
        for index, stream in self._streams.items():
            torch.cuda.current_stream(index).wait_stream(stream)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, (now, *_) in enumerate(self._pairs):
            groups.setdefault((now.device, now.dtype, now.shape), []).append(place)
        flags: dict[torch.device, list[torch.Tensor]] = {}
        places: dict[torch.device, list[int]] = {}
        for (device, *_), members in groups.items():
            now = as_integers(torch.stack([self._pairs[place][0] for place in members]))
            then = as_integers(torch.stack([self._pairs[place][1] for place in members]))
            flags.setdefault(device, []).append((now != then).unsqueeze(-1).flatten(1).any(1))
            places.setdefault(device, []).extend(members)
        wrong = [
            place
            for device, found in flags.items()
            for place, differs in zip(places[device], torch.cat(found).tolist(), strict=True)
            if differs
        ]
        heard: set[int] = set()
        for place in sorted(wrong):
            now, then, judge = self._pairs[place]
            if id(judge) not in heard:
                heard.add(id(judge))
                judge(max_ulp(now, then))


def pattern(value: Value) -> tuple[int, int]:
    """``(step, room)`` of a strided sample of a value: element ``k`` lies ``k * step + turn % room`` behind its start.

    A dense value is sampled all over its memory; of one with gaps, only the longest contiguous run is.
    """
    length = _dense_run(value)
    step = max(length // NUM_SAMPLES, 0)
    if step == 0:
        return 0, max(length, 1)
    return step, length - step * (NUM_SAMPLES - 1)


def _dense_run(value: Value) -> int:
    length = 1
    for size, stride in sorted(zip(value.size, value.stride, strict=True), key=lambda pair: pair[1]):
        if size == 0:
            return 0
        if size == 1 or stride == 0:
            continue
        if stride != length:
            break
        length *= size
    return length


def take(tensor: torch.Tensor, step: int, offset: int) -> torch.Tensor:
    """The sample, as a view."""
    return tensor.as_strided((NUM_SAMPLES,), (step,), tensor.storage_offset() + offset)


def all_bits(value: torch.Tensor) -> torch.Tensor:
    """What tells all bits of ``value`` from others: their hash, or a copy where that is smaller work."""
    return as_integers(value.clone()) if _small(value) else hash_on_device(value)


def same_bits(value: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether `all_bits` are as they were in the forward."""
    return torch.equal(as_integers(value) if _small(value) else hash_on_device(value), expected)


def _small(value: torch.Tensor) -> bool:
    return value.numel() * value.element_size() <= SMALL_BYTES


class Turns:
    """Whose bits are hashed: one call per program and step, in turn."""

    __slots__ = ("_before", "_now", "_step")

    def __init__(self) -> None:
        """Nothing has been called yet."""
        self._step = -1
        self._now: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def due(self, program: str, step: int) -> bool:
        """Whether this call is the one; to be asked once per call."""
        if step != self._step:
            self._step, self._before, self._now = step, self._now, {}
        place = self._now.get(program, 0)
        self._now[program] = place + 1
        return place == step % self._before.get(program, 1)


def meta(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a recomputed tensor must share with the saved one."""
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return tuple(tensor.shape), strides, tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg()
