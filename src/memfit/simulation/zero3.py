"""DeepSpeed's ZeRO 3, as the schedule of what it gathers, reduces and steps: its engine does not run on fake tensors.

Read from DeepSpeed 0.19.8, `runtime/zero/stage3.py` and `parameter_offload.py`, without offloading and with the
settings that ``auto`` in a Trainer's configuration has (see `gathering`). Of N ranks each has

- from the start: 1/N of every parameter, padded, and in fp32 of those that train; 1/N of the gradients; a bucket of
  ``reduce_bucket_size`` elements;
- around a module's forward and backward: its parameters, as `gathering` says. They are bytes here, not tensors: the
  model's own are there throughout and count nothing;
- in the backward: gradients move into the bucket as they come; one that does not fit stays where it is. A full bucket
  is reduced, through a flat copy unless it is one gradient that divides evenly;
- in the step: nothing gathered. For each group of ``sub_group_size`` elements its gradients, flat, in fp32, and the
  optimizer; then small parameters are gathered for good.

The order in which modules are fetched is that of the step before, so a step is rehearsed once to see it (`Order`), and
once with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from memfit.parallelism import Parallelism
from memfit.simulation.gathering import Gathering, Settings, Weight
from memfit.simulation.ledger import Ledger
from memfit.simulation.listening import listen
from memfit.simulation.parallel import Blocks, MakeOptimizer
from memfit.simulation.traffic import Traffic
from memfit.simulation.zero import Engine, hidden_size

_AGAIN = " runs again"
"""No module's name."""


@dataclass(slots=True)
class Order:
    """What a rehearsal has shown.

    Attributes:
        modules: By name, as they were fetched.
        entries: How many had been when the backward of a block began, and of which.
        forwards: By block, those that its forward fetches.
    """

    modules: list[str] = field(default_factory=list)
    entries: list[tuple[int, str]] = field(default_factory=list)
    forwards: dict[str, list[str]] = field(default_factory=dict)

    def again(self) -> list[str]:
        """As they are fetched if each block is run again when its backward begins."""
        found: list[str] = []
        done = 0
        for place, block in self.entries:
            found += [*self.modules[done:place], *self.forwards[block]]
            done = place
        return found + self.modules[done:]


class Zero3(Engine):
    """Stage 3: all in parts; parameters are whole around a module's own forward and backward."""

    shards = True
    lasting = False
    moves_gradients = True

    def __init__(
        self,
        parallelism: Parallelism,
        traffic: Traffic,
        *,
        order: Order | None = None,
        runs_again: bool = False,
        settings: Settings | None = None,
    ) -> None:
        """For one rehearsal.

        Args:
            parallelism: Of stage 3.
            traffic: Takes down what is sent.
            order: What a rehearsal before has shown.
            runs_again: Whether blocks are run again as a whole in the backward, and not by recipes.
            settings: Of the configuration; by default as ``auto`` has them.
        """
        super().__init__(parallelism, traffic)
        self.order = Order()
        self._known = order
        self._runs_again = runs_again
        self._settings = settings or Settings()
        self._asked = settings is not None
        self._weights: dict[int, Weight] = {}
        self._inside: dict[str, str] = {}  # by module the block that it lies in
        self._tokens: dict[tuple[str, bool], list[tuple[bool, str]]] = {}
        self._clock: float | None = None
        self._late: list[int] | None = None  # gathers that a block which is passed over waits for in its end
        self._base = self._highest = 0

    # Around modules

    def shard(self, model: torch.nn.Module, blocks: Blocks) -> None:
        """Hooks on every module."""
        self._hooks += listen(model, self._take)

    def _take(self, fetches: bool, name: str, backward: bool = False, again: bool = False) -> None:
        """A module is fetched or released for its forward or backward."""
        if not again:
            block = self._inside.get(name)
            if block is not None:
                self._tokens.setdefault((block, backward), []).append((fetches, name[len(block) :]))
            elif fetches:
                self._tokens[name, backward] = []
        if fetches:
            self._gathering.fetch(name, backward=backward, again=again)
        else:
            self._gathering.release(name, backward=backward)

    def passed_over(self, block: str, like: str, seconds: float) -> None:
        """Fetch and release within the last seconds what the other block did."""
        tokens = list(self._tokens.get((like, False), ()))
        for number, (fetches, name) in enumerate(tokens):
            self._clock = self._ledger.seconds - seconds * (1 - number / len(tokens))
            self._take(fetches, block + name)
        self._clock = None

    def entered(self, block: str, like: str | None = None) -> None:
        """The block runs again first, if blocks do; what it is passed over for tells where among its modules."""
        self._wait_for_late()
        if like is None:
            self._tokens.setdefault((block, True), []).append((False, _AGAIN))
            self._run_again(block)
            return
        self._late = []
        for fetches, name in list(self._tokens.get((like, True), ())):
            if name == _AGAIN:
                self._run_again(block)
            else:
                self._take(fetches, block + name, True)

    def _run_again(self, block: str) -> None:
        inner = self._tokens.get((block, False), [])
        self.order.entries.append((len(self.order.modules), block))
        self.order.forwards[block] = [block, *(block + name for fetches, name in inner if fetches)]
        if self._runs_again:
            for fetches, name in [(True, ""), *inner, (False, "")]:
                self._take(fetches, block + name, again=True)

    def reads(self, tensor: torch.Tensor) -> bool:
        """Whether recipes may: small parameters are there, and all of them where a block runs again as a whole."""
        weight = self._weights.get(id(tensor))
        return self._runs_again or weight is None or weight.elements <= self._settings.persistence

    def refers_to(self, tensor: torch.Tensor) -> bool:
        """Whether it is all of a parameter, which autograd keeps a reference to."""
        if self._runs_again:
            return False
        storage = tensor.untyped_storage()._cdata
        parameter = self._storages.get(storage)
        return parameter is not None and (parameter.shape, parameter.stride()) == (tensor.shape, tensor.stride())

    # The step

    def start(self, model: torch.nn.Module, blocks: Blocks, ledger: Ledger) -> int:
        """Make the parts, and take the gradients over as they come."""
        self._ledger = ledger
        if not self._asked:
            self._settings = Settings.of(hidden_size(model))
        parameters = list(model.parameters())
        self._storages = {p.untyped_storage()._cdata: p for p in parameters}
        for number, p in enumerate(parameters):
            self._weights[id(p)] = Weight(
                number=number, elements=p.numel(), itemsize=p.element_size(), trains=p.requires_grad
            )
        for block, module in blocks:
            inner = (f"{block}.{name}" if block else name for name, _ in module.named_modules() if name)
            self._inside.update(dict.fromkeys(inner, block))
        whole = ledger.disregard(parameters)
        shards = sum(weight.padded_bytes(self._ranks) for weight in self._weights.values()) // self._ranks
        trained = [p for p in parameters if p.requires_grad]
        dtype = trained[0].dtype
        self._groups = _grouped([-(-p.numel() // self._ranks) for p in trained], self._settings.group)
        self._masters = [torch.empty(size, dtype=torch.float32) for size in self._groups]
        self.buffered_bytes = sum(self._groups) * dtype.itemsize
        self._dtype = dtype
        self._always = [
            torch.empty(shards + self.buffered_bytes, dtype=torch.uint8),
            torch.empty(self._settings.bucket, dtype=dtype),
        ]
        self._take_over(trained, self._ready)
        order = self._known
        self._gathering = Gathering(
            self._owned(model),
            self._settings,
            self._ranks,
            order=None if order is None else order.again() if self._runs_again else order.modules,
            changed=self._changed,
            sent=lambda number, size: self.traffic.send(size, self._now(), key=number, early=True),
            waited=self._wait,
        )
        self.order.modules = self._gathering.order
        self._gathering.gather_persistent()
        return shards + 4 * sum(self._groups) - whole

    def _owned(self, model: torch.nn.Module) -> dict[str, Sequence[Weight]]:
        """By module its parameters; those of modules that are never called are their caller's."""
        called = None if self._known is None else set(self._known.modules)
        found: dict[str, dict[int, Weight]] = {name: {} for name, _ in model.named_modules()}
        for name, module in model.named_modules():
            owner = name
            while called is not None and owner and owner not in called:
                owner = owner.rpartition(".")[0]
            for parameter in module.parameters(recurse=False):
                weight = self._weights[id(parameter)]
                found[owner][weight.number] = weight
        return {name: [own[number] for number in sorted(own)] for name, own in found.items()}

    def _changed(self, size: int) -> None:
        self._ledger.grow(size)
        self._reach(self._gathering.now)

    def _reach(self, size: int) -> None:
        self._highest = max(self._highest, size - self._base)

    def _now(self) -> float:
        return self._ledger.seconds if self._clock is None else self._clock

    def _wait(self, number: int) -> None:
        if self._late is None:
            self.traffic.wait(number, self._now())
        else:
            self._late.append(number)

    def _wait_for_late(self) -> None:
        late, self._late = self._late or (), None
        for number in late:
            self.traffic.wait(number, self._ledger.seconds)

    # The backward

    def _ready(self, parameter: torch.Tensor) -> None:
        """A gradient is there: it goes into the bucket, which is reduced before, where it is full."""
        count, limit = parameter.numel(), self._settings.bucket
        if self._elements and self._elements + count > limit:
            self._reduce()
        if count > limit:
            self._large = parameter.grad
        self._pending.append(parameter)
        self._elements += count
        parameter.grad = None

    def _reduce(self) -> None:
        if not self._pending:
            return
        size = self._dtype.itemsize
        padded = [-(-p.numel() // self._ranks) * self._ranks for p in self._pending]
        flat = sum(padded) if len(padded) > 1 or padded[0] != self._pending[0].numel() else 0
        buffer = torch.empty(flat, dtype=self._dtype)
        self.traffic.send(sum(padded) * size, self._ledger.seconds)
        large = 0 if self._large is None else self._large.numel() * size
        self._reach(self._gathering.now + flat * size + large)
        del buffer
        self._pending, self._elements, self._large = [], 0, None

    def ended(self) -> None:
        """The backward has: what is left is reduced, and nothing stays gathered."""
        self._wait_for_late()
        self._reduce()
        self._gathering.ended()
        self._gathering.release_all()

    def transient(self) -> int:
        """The most that was gathered, and copied to be reduced, beyond what was gathered at the last call."""
        found, self._highest, self._base = self._highest, 0, self._gathering.now
        return found

    # The step of the optimizer

    def optimizer(self, make: MakeOptimizer, parameters: Sequence[torch.Tensor]) -> Any:
        """Of the fp32 parts."""
        return _Step(self, make, [torch.nn.Parameter(master) for master in self._masters])

    def flat_gradients(self, number: int) -> torch.Tensor:
        """Of a group, in fp32."""
        return torch.empty(self._groups[number], dtype=self._dtype).to(torch.float32)

    def gather(self) -> None:
        """Small parameters, for good."""
        self.traffic.send(self._gathering.persistent_bytes(), self._ledger.seconds, key=id(self))
        self.traffic.wait(id(self), self._ledger.seconds)
        self._gathering.gather_persistent()


class _Step:
    """As an optimizer."""

    def __init__(self, zero: Zero3, make: MakeOptimizer, masters: list[torch.nn.Parameter]) -> None:
        self._zero = zero
        self._masters = masters
        self._optimizer = make(masters)

    @property
    def state(self) -> Any:
        return self._optimizer.state

    def step(self) -> None:
        for number, master in enumerate(self._masters):
            master.grad = self._zero.flat_gradients(number)
            self._optimizer.step()
            master.grad = None
        self._zero.gather()


def _grouped(sizes: list[int], limit: int) -> list[int]:
    """Elements of each group, in which parameters are whole."""
    found = [0]
    for size in sizes:
        if found[-1] >= limit:
            found.append(0)
        found[-1] += size
    return found


__all__ = ["Order", "Zero3"]
