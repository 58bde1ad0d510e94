"""Which parameters ZeRO-3 has gathered, and when: DeepSpeed's coordinator, without its tensors.

Read from DeepSpeed 0.19.8, `runtime/zero/partitioned_param_coordinator.py` and `partition_parameters.py`. Before a
module's forward, and again before its backward, its parameters are fetched; in the order that the step before had, the
next ones are prefetched, until they are ``prefetch`` elements or more. Afterwards they are released, unless they are
small (``persistence``), or come again before ``reuse`` other elements. One parameter is gathered to where it is used;
several into one buffer, which they are copied out of and which is there until the last of them has been fetched.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of the configuration, in elements; by default DeepSpeed's own.

    Attributes:
        bucket: ``reduce_bucket_size``.
        prefetch: ``stage3_prefetch_bucket_size``.
        persistence: ``stage3_param_persistence_threshold``.
        live: ``stage3_max_live_parameters``.
        reuse: ``stage3_max_reuse_distance``.
        group: ``sub_group_size``.
    """

    bucket: int = 500_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    group: int = 1_000_000_000

    @staticmethod
    def of(hidden_size: int | None) -> Settings:
        """As ``auto`` in a Trainer's configuration has them; DeepSpeed's own without a hidden size.

        Source:
            transformers 5.23, `HfTrainerDeepSpeedConfig.trainer_config_finalize`.
        """
        if hidden_size is None:
            return Settings()
        square = hidden_size * hidden_size
        return Settings(bucket=square, prefetch=int(0.9 * square), persistence=10 * hidden_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A parameter.

    Attributes:
        number: Its place in the model.
        elements: Of it, whole.
        itemsize: Bytes of each.
        trains: Whether it gets a gradient.
    """

    number: int
    elements: int
    itemsize: int
    trains: bool

    def padded_bytes(self, num_devices: int) -> int:
        """Of all parts, which are equally long."""
        return -(-self.elements // num_devices) * num_devices * self.itemsize


@dataclass(slots=True, eq=False)
class _Gather:
    """One collective."""

    weights: list[Weight]
    buffer_bytes: int
    waiting: int
    over: bool = False


@dataclass(slots=True)
class _Trace:
    """The order in which a step fetches the parameters of its modules."""

    modules: Sequence[str]
    places: dict[int, list[int]] = field(default_factory=dict)
    before: list[int] = field(default_factory=lambda: [0])

    def read(self, weights: Mapping[str, Sequence[Weight]]) -> deque[tuple[Weight, int]]:
        """Where each parameter is used, elements before each place; returns what is fetched, in order."""
        queue: deque[tuple[Weight, int]] = deque()
        for place, name in enumerate(self.modules):
            for weight in weights[name]:
                self.places.setdefault(weight.number, []).append(place)
                queue.append((weight, place))
            self.before.append(self.before[-1] + sum(weight.elements for weight in weights[name]))
        return queue

    def returns_within(self, weight: Weight, place: int, distance: int) -> bool:
        """Whether a parameter is used again before so many elements."""
        places = self.places.get(weight.number, [])
        found = bisect_left(places, place)
        return found < len(places) and self.before[places[found]] - self.before[place] < distance


class Gathering:
    """One step of one device.

    Attributes:
        now: Bytes of gathered parameters, and of buffers that they are gathered into.
        order: Modules in the order in which they were fetched so far.
    """

    def __init__(
        self,
        weights: Mapping[str, Sequence[Weight]],
        settings: Settings,
        num_devices: int,
        *,
        order: Sequence[str] | None = None,
        changed: Callable[[int], None] = lambda _: None,
        sent: Callable[[int, int], None] = lambda _, __: None,
        waited: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Nothing is gathered.

        Args:
            weights: Of each module its own parameters.
            settings: Of the configuration.
            num_devices: That share the parameters.
            order: That of a step before; ``None``: there was none, nothing is prefetched and all is released.
            changed: Is told by how many bytes `now` changes.
            sent: Is told of each collective: its number and bytes.
            waited: Is told when one has to be over.
        """
        self.now = 0
        self.order: list[str] = []
        self._weights = weights
        self._settings = settings
        self._num_devices = num_devices
        self._changed, self._sent, self._waited = changed, sent, waited
        self._trace = _Trace(order) if order is not None else None
        self._queue = self._trace.read(weights) if self._trace is not None else deque()
        self._there: dict[int, int] = {}  # bytes of each that is gathered
        self._flying: dict[int, _Gather] = {}
        self._users: dict[int, set[str]] = {}
        self._reached: dict[int, int] = {}  # the place up to which a parameter has been fetched for
        self._backward: dict[str, None] = {}  # modules whose backward has begun and not ended
        self._owed: dict[str, list[Weight]] = {}  # frozen ones, fetched by a forward within a backward
        self._place = 0
        self._elements = 0

    def gather_persistent(self) -> None:
        """Small parameters, before the first forward and after each optimizer step."""
        for weight in {w.number: w for own in self._weights.values() for w in own}.values():
            if self._persists(weight) and weight.number not in self._there:
                self._arrive(weight, weight.padded_bytes(self._num_devices))

    def persistent_bytes(self) -> int:
        """That all devices send each other then."""
        every = {w.number: w for own in self._weights.values() for w in own}.values()
        return sum(w.padded_bytes(self._num_devices) for w in every if self._persists(w))

    def fetch(self, name: str, *, backward: bool = False, again: bool = False) -> None:
        """A module's forward or backward is about to begin.

        Args:
            name: Of the module.
            backward: Which of them.
            again: Whether it is a forward that is run again within the backward.
        """
        if self._trace is not None and self._trace.modules[self._place : self._place + 1] != [name]:
            self._invalidate()
        self.order.append(name)
        own = self._weights[name]
        if backward:
            self._backward[name] = None
        self._gather([weight for weight in own if self._is_gone(weight)])
        for weight in own:
            self._users.setdefault(weight.number, set()).add(name)
            if again and self._backward and not weight.trains:
                owner = next(reversed(self._backward))
                self._users[weight.number].add(owner)
                self._owed.setdefault(owner, []).append(weight)
            self._wait(weight)
        if self._trace is not None:
            self._prefetch(own)
        self._place += 1

    def _prefetch(self, own: Sequence[Weight]) -> None:
        missing = {w.number for w in own if self._reached.get(w.number, -1) < self._place}
        passed: set[int] = set()
        while self._queue and len(passed) < len(missing):
            weight, place = self._queue.popleft()
            self._reached[weight.number] = place
            passed.add(weight.number)
        room = min(self._settings.live - self._elements, self._settings.prefetch)
        found: dict[int, Weight] = {}
        elements = 0
        while self._queue and elements < room:
            weight, place = self._queue.popleft()
            self._reached[weight.number] = max(self._reached.get(weight.number, -1), place)
            if self._is_gone(weight) and weight.number not in found:
                found[weight.number] = weight
                elements += weight.elements
        self._gather(list(found.values()))

    def release(self, name: str, *, backward: bool = False) -> None:
        """It has ended."""
        own = self._weights[name]
        leaving = {w.number for w in own}
        if self._trace is not None:
            leaving = {w.number for w in own if not self._persists(w) and not self._returns(w)}
        more: list[Weight] = []
        if backward:
            more = self._owed.pop(name, [])
            leaving |= {w.number for w in more if not self._persists(w)}
            self._backward.pop(name, None)
        for weight in dict.fromkeys((*own, *more)):
            self._users.get(weight.number, set()).discard(name)
            if weight.number in leaving:
                self._let_go(weight)

    def ended(self) -> None:
        """The backward has: what no module has released goes, but for small ones."""
        while self._backward:
            name, _ = self._backward.popitem()
            for weight in (*self._weights[name], *self._owed.pop(name, [])):
                self._users.get(weight.number, set()).discard(name)
                if not self._persists(weight):
                    self._let_go(weight)

    def release_all(self) -> None:
        """The optimizer's step begins."""
        for gather in set(self._flying.values()):
            self._change(-gather.buffer_bytes)
        self._flying.clear()
        self._users.clear()
        self._change(-sum(self._there.values()))
        self._there.clear()

    # One parameter

    def _persists(self, weight: Weight) -> bool:
        return weight.elements <= self._settings.persistence

    def _returns(self, weight: Weight) -> bool:
        assert self._trace is not None
        skipped = self._reached.get(weight.number, -1) > self._place
        return skipped or self._trace.returns_within(weight, self._place, self._settings.reuse)

    def _is_gone(self, weight: Weight) -> bool:
        return weight.number not in self._there and weight.number not in self._flying

    def _gather(self, weights: list[Weight]) -> None:
        if not weights:
            return
        size = sum(weight.padded_bytes(self._num_devices) for weight in weights)
        gather = _Gather(weights, size, len(weights))
        for weight in weights:
            self._flying[weight.number] = gather
        self._elements += sum(weight.elements for weight in weights)
        self._change(size)
        self._sent(id(gather), size)

    def _wait(self, weight: Weight) -> None:
        gather = self._flying.pop(weight.number, None)
        if gather is None:
            return
        self._waited(id(gather))
        alone = len(gather.weights) == 1
        if not gather.over:
            gather.over = True
            for each in gather.weights:
                if not alone:
                    self._arrive(each, each.elements * each.itemsize)
                else:
                    self._there[each.number] = gather.buffer_bytes
        gather.waiting -= 1
        if not gather.waiting and not alone:
            self._change(-gather.buffer_bytes)

    def _arrive(self, weight: Weight, size: int) -> None:
        self._there[weight.number] = size
        self._change(size)

    def _let_go(self, weight: Weight) -> None:
        if weight.number in self._there and not self._users.get(weight.number):
            self._change(-self._there.pop(weight.number))
            self._elements -= weight.elements

    def _change(self, size: int) -> None:
        self.now += size
        if size:
            self._changed(size)

    def _invalidate(self) -> None:
        """The step is another than the one before: nothing is known of what comes."""
        self._trace = None
        self._queue.clear()


__all__ = ["Gathering", "Settings", "Weight"]
