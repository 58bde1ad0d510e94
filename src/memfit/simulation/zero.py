"""DeepSpeed's ZeRO 1 and 2, as the schedule of what its optimizer allocates: its engine does not run on fake tensors.

Read from DeepSpeed 0.19.8, `runtime/zero/stage_1_and_2.py`, without offloading and with the settings that are in place
unless a configuration has others (contiguous gradients, no overlap). Of P trained elements and N ranks each rank has

- from the start: the padding of the flat weights, and its 1/N of them in fp32 (`single_partition_of_fp32_groups`);
- in the backward: a bucket of ``reduce_bucket_size`` elements (`setup_buckets`), into which gradients are moved as they
  come (stage 2) or when the backward has ended (stage 1). A full bucket is reduced, through a flat copy where it holds
  gradients of several partitions (`allreduce_bucket`); what belongs to the rank's own partition is then copied to
  `grads_in_partition`, whole parameters even where the partition holds a part of one. A gradient larger than the bucket
  is reduced where it is;
- in the step: the flat gradients of the partition and, where they are not, the same in fp32; the optimizer of the fp32
  partition; then the weights are gathered in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from memfit.parallelism import Parallelism
from memfit.simulation.ledger import Ledger
from memfit.simulation.parallel import Blocks, MakeOptimizer, Team
from memfit.simulation.traffic import Traffic
from memfit.training import TrainingState

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's own; ``auto`` in a Trainer's configuration is the square of the model's hidden size."""
_ALIGNED = 2  # elements of each rank: `nccl_start_alignment_factor`


class Engine(Team):
    """What all stages do: hooks take gradients over as they come, and put them into a bucket until it is full."""

    together = True

    def __init__(self, parallelism: Parallelism, traffic: Traffic) -> None:
        self.traffic: Traffic = traffic
        self._ranks = parallelism.num_devices
        self._hooks: list[Any] = []
        self._pending: list[torch.Tensor] = []
        self._elements = 0
        self._large: torch.Tensor | None = None

    @contextlib.contextmanager
    def around(self, ledger: Ledger) -> Iterator[None]:
        try:
            yield
        finally:
            for hook in self._hooks:
                hook.remove()

    def _take_over(self, parameters: Sequence[torch.Tensor], ready: Callable[[torch.Tensor], None]) -> None:
        """Call ``ready`` with each parameter whose gradient is there."""
        for parameter in parameters:
            hook: Callable[..., Any] = parameter.register_post_accumulate_grad_hook
            self._hooks.append(hook(ready))

    def gradient_bytes(self, states: TrainingState) -> int:
        """Of gradients that are there: in the bucket they are no more, but for one that is larger."""
        large = 0 if self._large is None else self._large.numel() * self._large.element_size()
        return states.gradient_bytes() + large


class Zero(Engine):
    """Stages 1 and 2: optimizer state in parts; in stage 2 gradients too."""

    def __init__(self, parallelism: Parallelism, traffic: Traffic) -> None:
        super().__init__(parallelism, traffic)
        self.moves_gradients = parallelism.stage == 2
        self._ledger: Ledger | None = None
        self._master: torch.Tensor | None = None
        self._padding: torch.Tensor | None = None
        self._bucket: torch.Tensor | None = None
        self._mine: torch.Tensor | None = None
        self._transient = 0

    def start(self, model: torch.nn.Module, blocks: Blocks, ledger: Ledger) -> int:
        """Make the fp32 partition, and take the gradients over as they come."""
        self._ledger = ledger
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._dtype = self._parameters[0].dtype
        total = sum(p.numel() for p in self._parameters)
        unit = _ALIGNED * self._ranks
        whole = -(-total // unit) * unit
        self._size = whole // self._ranks
        self._place(self._size)
        self._limit = bucket_elements(model)
        self._padding = torch.empty(whole - total, dtype=self._dtype)
        self._master = torch.empty(self._size, dtype=torch.float32)
        self._take_over(self._parameters, self._ready)
        return self._size * 4 + (whole - total) * self._dtype.itemsize

    def _place(self, size: int) -> None:
        """Which partitions each parameter lies in, and the rank whose partition touches most elements: that one."""
        self._partitions: dict[int, range] = {}
        touched: dict[int, int] = {}
        offset = 0
        for parameter in self._parameters:
            first, last = offset // size, (offset + max(1, parameter.numel()) - 1) // size
            self._partitions[id(parameter)] = range(first, last + 1)
            for rank in range(first, last + 1):
                touched[rank] = touched.get(rank, 0) + parameter.numel()
            offset += parameter.numel()
        self._rank = max(touched, key=lambda rank: (touched[rank], -rank))
        self._touched = touched[self._rank]

    # The backward

    def _ready(self, parameter: torch.Tensor) -> None:
        if self._bucket is None:
            self._bucket = torch.empty(self._limit, dtype=self._dtype)
        if self.moves_gradients:
            self._move(parameter)

    def _move(self, parameter: torch.Tensor) -> None:
        """Its gradient goes into the bucket, which is reduced before, where it is full."""
        count = parameter.numel()
        if self._elements + count > self._limit:
            self._reduce()
        if count > self._limit:
            self._large = parameter.grad
        self._pending.append(parameter)
        self._elements += count
        parameter.grad = None

    def _reduce(self) -> None:
        if not self._pending:
            return
        ledger = self._ledger
        assert ledger is not None
        several = len({rank for p in self._pending for rank in self._partitions[id(p)]}) > 1
        size = self._elements * self._dtype.itemsize
        flat = torch.empty(self._elements, dtype=self._dtype) if several else None
        self.traffic.send(size, ledger.seconds, rounds=2, key=id(self))
        self.traffic.wait(id(self), ledger.seconds)
        self._transient = max(self._transient, size if several else 0)
        del flat
        if self._mine is None and any(self._rank in self._partitions[id(p)] for p in self._pending):
            self._mine = torch.empty(self._touched, dtype=self._dtype)
        self._pending, self._elements, self._large = [], 0, None

    def ended(self) -> None:
        """The backward has: what is left is reduced, all of it in stage 1; then the bucket goes."""
        if not self.moves_gradients:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    self._move(parameter)
        self._reduce()
        self._bucket = None

    def transient(self) -> int:
        """The largest copy that was made to reduce a bucket, since the last call, in bytes."""
        found, self._transient = self._transient, 0
        return found

    def gradient_bytes(self, states: TrainingState) -> int:
        """And of the rank's own part."""
        mine = 0 if self._mine is None else self._mine.numel() * self._mine.element_size()
        return super().gradient_bytes(states) + mine

    def resident_bytes(self, ended: int) -> int:
        """In stage 1 gradients stay whole until the last micro-batch."""
        whole = sum(p.numel() * p.element_size() for p in self._parameters)
        return ended if self.moves_gradients else max(ended, whole)

    # The step

    def optimizer(self, make: MakeOptimizer, parameters: Sequence[torch.Tensor]) -> Any:
        """Of the fp32 partition."""
        assert self._master is not None
        return _Step(self, make, torch.nn.Parameter(self._master))

    def flat_gradients(self) -> torch.Tensor:
        """Of the partition, in fp32; the others go."""
        flat = torch.empty(self._size, dtype=self._dtype)
        single = flat.to(torch.float32)
        self._mine = None
        return single

    def gather(self) -> None:
        """Send the weights that this rank has stepped, and wait for those of the others."""
        assert self._ledger is not None
        clock = self._ledger.seconds
        self.traffic.send(self._size * self._ranks * self._dtype.itemsize, clock, key=id(self))
        self.traffic.wait(id(self), clock)


class _Step:
    """As an optimizer."""

    def __init__(self, zero: Zero, make: MakeOptimizer, master: torch.nn.Parameter) -> None:
        self._zero = zero
        self._master = master
        self._optimizer = make([master])

    @property
    def state(self) -> Any:
        return self._optimizer.state

    def step(self) -> None:
        self._master.grad = self._zero.flat_gradients()
        self._optimizer.step()
        self._master.grad = None
        self._zero.gather()


def bucket_elements(model: torch.nn.Module) -> int:
    """``reduce_bucket_size`` as ``auto`` in a Trainer's configuration has it; DeepSpeed's own without a hidden size.

    Source:
        transformers 5.23, `HfTrainerDeepSpeedConfig.trainer_config_finalize`.
    """
    size = hidden_size(model)
    return BUCKET_ELEMENTS if size is None else size * size


def hidden_size(model: torch.nn.Module) -> int | None:
    """Of a model of transformers, as ``auto`` reads it."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    size = getattr(text, "hidden_size", None)
    return size if isinstance(size, int) and size > 0 else None


__all__ = ["Engine", "Zero", "hidden_size"]
