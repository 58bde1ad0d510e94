"""Where steps of one model are rehearsed: on a device, with an optimizer, and with what several devices share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.blocks import find_blocks, replayable_children
from memfit.errors import MemfitError, ModelError
from memfit.hardware import Hardware
from memfit.parallelism import Parallelism
from memfit.sharding import class_name
from memfit.simulation import cached
from memfit.simulation.chunks import NotChunkedError, chunked_loss, chunks_alike
from memfit.simulation.fakes import fake_tensors, uncheckpointed
from memfit.simulation.ledger import Ledger
from memfit.simulation.parallel import MakeOptimizer, Team, process_group
from memfit.simulation.rates import rates
from memfit.simulation.rehearsal import Rehearsal
from memfit.simulation.results import Rehearsed
from memfit.simulation.target import CudaKernels
from memfit.simulation.tasks import Job, Split
from memfit.simulation.teams import make_team
from memfit.simulation.zero3 import Order, Zero3


class Stage:
    """Set it, get a job, and rehearse that with this loss or another.

    Attributes:
        notes: What was done to the model for the rehearsal, as sentences.
    """

    def __init__(
        self,
        entry: Hardware,
        prepare: Callable[[Split], Job],
        optimizer: MakeOptimizer | None,
        parallelism: Parallelism,
        *,
        precision: str,
        accumulates: bool,
    ) -> None:
        """For one configuration.

        Args:
            entry: The device.
            prepare: Makes the model and its batch, on fake tensors; it is given what splits the model's layers.
            optimizer: Makes the optimizer of the parameters that train.
            parallelism: What devices do together.
            precision: One of `PRECISIONS`.
            accumulates: Whether gradients are there before the forward.
        """
        self.notes: tuple[str, ...] = ()
        self._entry = entry
        self._prepare = prepare
        self._optimizer = optimizer
        self._parallelism = parallelism
        self._precision = precision
        self._accumulates = accumulates
        self._sharded: list[torch.nn.Module] = []
        self._mode: FakeTensorMode | None = None
        self._mesh: Any = None
        self._order: Order | None = None

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        """Jobs are made and rehearsed inside; those of one stage belong together."""
        with process_group(self._parallelism) as self._mesh, fake_tensors(self._mode) as self._mode:
            yield

    @property
    def runs_whole(self) -> bool:
        """Whether a block that runs again as a whole gathers what recipes do not read (ZeRO-3)."""
        return isinstance(self._team(), Zero3)

    @property
    def shards(self) -> bool:
        """Whether parameters are there only around a block's own forward and backward."""
        return self._team().shards

    @property
    def splits(self) -> bool:
        """Whether layers are split among devices."""
        return self._team().splits

    def job(self) -> Job:
        """A model and its batch, without the checkpointing that the model may do itself."""
        job = self._prepare(self._team().split)
        self.notes = tuple(uncheckpointed(job.model))
        return job

    def with_chunked_loss(self, job: Job, like: Rehearsed | None = None) -> Rehearsed:
        """The step with its loss in chunks; ``like``: with its loss as it is.

        Raises:
            ModelError: Its loss is not one that can be computed in chunks.
        """
        if self.shards or self.splits:
            how = "split among devices" if self.splits else "sharded and gathered for the head alone"
            raise ModelError(
                f"The chunked loss reads the head's weight, which is {how}: leave `chunked_loss` out, or shard in "
                "another way (`ddp`, `zero` 1 or 2)."
            )
        with chunked_loss(job.model, cuda=self._entry.backend == "cuda") as is_one:
            try:
                found = self.rehearse(job, like) if is_one else None
            except NotChunkedError:
                found = None
        if found is None:
            raise ModelError(
                f"The loss of {class_name(job.model)} cannot be predicted in chunks: leave `chunked_loss` out."
            )
        return found

    def in_sub_batches(self, job: Job, rows: int) -> Rehearsed:
        """The step in sub-batches whose gradients are cached.

        Raises:
            ModelError: Parameters are sharded.
        """
        if self.shards or self.splits:
            raise ModelError(
                "Cached gradients are not predicted where parameters are sharded: leave `cache_rows` (`--sub-batch`) "
                "out, or keep them whole (`ddp`, `zero` 1 or 2)."
            )
        ledger = Ledger(rates(self._entry))
        return cached.rehearse(
            job, rows, ledger, lambda each: self.rehearse(each, resident=True), accumulates=self._accumulates
        )

    def rehearse(
        self, job: Job, like: Rehearsed | None = None, *, resident: bool = False, again: bool = False
    ) -> Rehearsed:
        """The step with the kernels and at the rates of the device; blocks that cannot be replayed are split.

        Args:
            job: From `job`.
            like: As `Rehearsal.run` has it.
            resident: Whether gradients are there before the forward, even if none are accumulated.
            again: ZeRO-3: whether blocks are run again as a whole in the backward.

        Raises:
            ModelError: The model does not run on fake tensors, or has no blocks.
        """
        blocks = find_blocks(job.model)
        doubles = True
        order = self._order if again else None
        while True:
            team = self._team(order=order, runs_again=again)
            if team.shards or team.splits:
                job = self._shard(team, job)
                blocks = [(name, job.model.get_submodule(name)) for name, _ in blocks]
            ledger = Ledger(rates(self._entry), traffic=team.traffic)
            kernels = CudaKernels() if self._entry.backend == "cuda" else contextlib.nullcontext()
            try:
                with (
                    team.around(ledger),
                    chunks_alike(ledger),
                    Rehearsal(job.model, blocks, ledger, doubles=doubles, team=team) as rehearsal,
                    ledger,
                    kernels,
                ):
                    resident = resident or self._accumulates
                    found = rehearsal.run(job.batch, job.loss, self._optimizer, resident=resident, like=like)
            except (MemfitError, NotChunkedError):
                raise
            except Exception as error:
                if doubles:  # a block that was passed over may have left out what others look for
                    doubles, order = False, None
                    continue
                what = str(error).splitlines()[0] if str(error) else ""
                raise team.refused(job.model, f"{type(error).__name__}: {what}") from error
            if rehearsal.differs:
                doubles, order = False, None
                continue
            if not rehearsal.not_replayable and order is None and isinstance(team, Zero3):
                order = self._order = team.order  # gathers of a step follow the order of the one before
                continue
            if team.splits or not rehearsal.not_replayable:
                return found
            order = None
            blocks = [part for block in blocks for part in _split(block, rehearsal.not_replayable)]

    def _team(self, *, order: Order | None = None, runs_again: bool = False) -> Team:
        return make_team(
            self._parallelism, self._entry, self._precision, self._mesh, order=order, runs_again=runs_again
        )

    def _shard(self, team: Team, job: Job) -> Job:
        """A model can be sharded once, and rehearsed once then."""
        if any(job.model is model for model in self._sharded):
            job = self.job()
        team.shard(job.model, find_blocks(job.model))
        if team.lasting:
            self._sharded.append(job.model)
        return job


def _split(block: tuple[str, torch.nn.Module], names: Collection[str]) -> list[tuple[str, torch.nn.Module]]:
    """A block that cannot be replayed is planned for by its children, as a live step does (rule 13)."""
    name, module = block
    if name not in names:
        return [block]
    return [(f"{name}.{child}" if name else child, part) for child, part in replayable_children(module)]


__all__ = ["Stage"]
