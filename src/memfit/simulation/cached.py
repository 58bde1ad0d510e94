"""A contrastive step whose gradients are cached, on fake tensors: one sub-batch is rehearsed, the rest is counted.

`contrastive.cached_embeddings` encodes all sub-batches without a graph, which takes no more than one with a graph; then
comes the loss over all embeddings; then one sub-batch after the other is encoded again and differentiated, gradients of
parameters and embeddings being there. The plan is for those: it is the same for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from memfit.errors import UsageError
from memfit.profiles import StepEvent
from memfit.simulation.ledger import Ledger
from memfit.simulation.results import Rehearsed
from memfit.simulation.tasks import Job
from memfit.sub_batches import rows_of

MAX_REHEARSALS = 3
"""Of sub-batches of other sizes, to find the largest that fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The rows of a contrastive batch.

    Attributes:
        lengths: Of each batch.
    """

    lengths: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Of all batches together."""
        return sum(self.lengths)

    @property
    def largest(self) -> int:
        """Of the largest of them."""
        return max(self.lengths)


def sizes_of(job: Job) -> Sizes | None:
    """The rows of a job whose gradients can be cached; ``None`` of another."""
    if job.contrast is None:
        return None
    return Sizes(lengths=tuple(len(next(iter(batch.values()))) for batch in job.contrast.batches))


def rehearse(job: Job, rows: int, ledger: Ledger, run: Callable[[Job], Rehearsed], *, accumulates: bool) -> Rehearsed:
    """A step in sub-batches.

    Args:
        job: The whole step.
        rows: Of a sub-batch.
        ledger: Sees the loss.
        run: Rehearses the step of one sub-batch, gradients of parameters being there from the start.
        accumulates: Whether these are there when the loss is computed, too.

    Raises:
        UsageError: The job is no contrastive one.
    """
    sizes = sizes_of(job)
    if sizes is None or job.contrast is None:
        raise UsageError(
            'Sub-batches are for contrastive batches: give a configuration and `task="embedder"` (`--task embedder`).'
        )
    contrast = job.contrast
    rows = min(rows, sizes.largest)
    largest = contrast.batches[sizes.lengths.index(sizes.largest)]
    piece = rows_of(largest, 0, rows)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        found = contrast.encode(piece)
        seen.append(found.detach()[:1])
        return found.sum()

    found = run(replace(job, loss=loss))
    embeddings = [seen[-1].new_empty(length, *seen[-1].shape[1:]).requires_grad_() for length in sizes.lengths]
    embedding_bytes = sum(each.nbytes for each in embeddings)
    seen.clear()
    with ledger:
        ledger.see(embeddings)
        value = contrast.loss(*embeddings)
        forward_flops = ledger.flops
        value.backward()  # type: ignore[no-untyped-call]
    times = sizes.rows / rows
    base = found.parameter_bytes + found.buffer_bytes + found.state_bytes
    accumulated = max(found.gradients) if accumulates else 0
    events = [StepEvent(name="loss", kind="outside", outside_bytes=base + accumulated + ledger.peak)]
    for event in found.profile.events:
        there = embedding_bytes if event.name == "optimizer" else 2 * embedding_bytes  # with their gradients
        name = "end of the forward of a sub-batch" if event.name == "loss" else event.name
        events.append(replace(event, name=name, outside_bytes=event.outside_bytes + there))
    own = found.step_seconds - found.optimizer_seconds + found.forward_seconds
    return replace(
        found,
        profile=replace(found.profile, events=tuple(events)),
        buffer_bytes=found.buffer_bytes + embedding_bytes,
        gradients=(accumulated, *found.gradients),
        forward_flops=times * found.forward_flops + forward_flops,
        backward_flops=times * found.backward_flops + ledger.flops - forward_flops,
        again_flops=times * found.forward_flops,
        forward_seconds=times * found.forward_seconds,
        step_seconds=times * own + ledger.seconds + found.optimizer_seconds,
        times=times,
    )


def largest_that_fits(guess: float, largest: int, peak_of: Callable[[int], int], fixed_bytes: int, limit: int) -> int:
    """The largest power of two of rows whose step saves everything within a limit, as far as a few tries show.

    What a row takes is taken to be the same for all sizes. Where none fits, the smallest that was tried.

    Args:
        guess: How many rows may fit.
        largest: Rows below which the answer is.
        peak_of: Bytes of a step that saves everything, of a number of rows.
        fixed_bytes: What no sub-batch changes.
        limit: Bytes.
    """
    most = 1 << max(0, (largest - 1).bit_length() - 1)
    rows, tried = _power(guess, most), dict[int, int]()
    for _ in range(MAX_REHEARSALS):
        tried[rows] = peak_of(rows)
        per_row = max(1.0, (tried[rows] - fixed_bytes) / rows)
        rows = _power((limit - fixed_bytes) / per_row, most)
        smallest = min(tried)
        if tried[smallest] > limit:
            rows = min(rows, smallest // 2)
        if rows == 0 or rows in tried or any(peak > limit for n, peak in tried.items() if n <= rows):
            break
    fitting = [n for n, peak in tried.items() if peak <= limit]
    return max(fitting) if fitting else min(tried)


def _power(number: float, most: int) -> int:
    """The power of two that is not above a number, from 1 to ``most``."""
    return 1 << max(0, min(int(max(1.0, min(number, most))).bit_length() - 1, most.bit_length() - 1))


__all__ = ["largest_that_fits", "rehearse", "sizes_of"]
