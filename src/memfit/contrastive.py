"""Contrastive batches in sub-batches: embeddings are cached, and encoded again for the backward.

A contrastive loss wants one large batch, since every row is a negative for all others; but it reads only embeddings,
which are small. So `cached_embeddings` runs the encoder without a graph, sub-batch by sub-batch. When the backward has
come to the gradient of the embeddings, each sub-batch is encoded again, with a graph and the same random numbers, and
differentiated alone: what autograd saves is that of one sub-batch. The price is one more forward.

The gradients are those of the same sub-batches in one graph, dropout included, in the same order of sums. Without
dropout and batch statistics they are those of the whole batch but for rounding.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv:2101.06983.
Differs: the loss is plain code on what is returned, so that loss scaling, accumulation and several encoders need
nothing of their own; and embeddings that come out differently the second time are an error, not another gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from memfit.canary import all_bits, meta, same_bits
from memfit.circumstances import (
    Autocast,
    Buffer,
    Modules,
    RandomStates,
    same_afterwards,
    same_random_numbers_afterwards,
)
from memfit.errors import ChangedEmbeddingError, ChangedTensorError, ModelError, UsageError
from memfit.negatives import gather_rows, info_nce
from memfit.sharding import reduces_gradients, unreduced
from memfit.sub_batches import flattened, joined, num_rows, rows_of, together


def cached_embeddings(encode: Callable[..., Any], *batches: Any, rows: int, reduce_once: bool = True) -> Any:
    """Encode batches in sub-batches, of which one at a time has a graph.

    Call it where the encoder would be called, under the same autocast and `no_sync`, and go on as usual: ``backward()``
    of a loss that reads the embeddings adds to ``.grad`` of what ``encode`` trains. What is one sub-batch in all is
    just encoded, but in a process group: there every call of a step has to reduce alike. Where gradients are off,
    sub-batches are encoded once. Hooks on parameters get the gradient of each sub-batch, one after the other.

    Args:
        encode: A module or function. It is called with a sub-batch, of a mapping as keywords, of a tuple as positions,
            and returns tensors in any structure, whose first dimension goes with the rows. It must do the same twice;
            torch's, Python's and NumPy's global random numbers are then what they were.
        batches: Tensors in mappings, tuples and lists, with their rows in the first dimension, all of a batch as many.
            Lists of texts or other plain values are rows too. Whatever has no dimension is passed as it is.
        rows: Of a sub-batch; the last one of a batch may have fewer.
        reduce_once: Whether DDP and FSDP2 reduce gradients with the last sub-batch only. ``False``: with each, so that
            FSDP2 never holds gradients that are not sharded.

    Returns:
        The embeddings of all rows, in the structure that ``encode`` returns; of several batches a tuple of these.

    Raises:
        UsageError: ``rows`` is below 1, a batch has no rows or unequal ones, ``encode`` returns something else than
            tensors with rows, or DDP has ``static_graph=True`` and ``reduce_once`` is set.
        ChangedEmbeddingError: In the backward, if a sub-batch is encoded to other bits than before.
        ChangedTensorError: In the backward, if a tensor of a batch has been written to.
        ModelError: In the backward, if that is `torch.autograd.grad`, or has ``inputs=`` or ``create_graph=True``; or
            if the loss depends on parameters that DDP reduces in another way too.
    """
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise UsageError(f"`rows={rows!r}` is no number of rows. Give a positive integer.")
    if not batches:
        raise UsageError("There is no batch: `cached_embeddings(encode, batch, rows=16)`.")
    pieces = [
        _Piece(number, start, min(start + rows, length))
        for number, length in enumerate(num_rows(b, f"batch {n}" if n else "the batch") for n, b in enumerate(batches))
        for start in range(0, length, rows)
    ]
    if len(pieces) == 1 and not (dist.is_available() and dist.is_initialized()):
        return _call(encode, batches[0])
    cache = _Cache(encode, batches, pieces, reduce_once=reduce_once)
    if torch.is_grad_enabled():
        flat = _Embed.apply(cache, torch.zeros((), requires_grad=True), *cache.leaves)  # type: ignore[no-untyped-call]
    else:
        flat = cache.embed()
    found = cache.structured(flat)
    return found[0] if len(batches) == 1 else tuple(found)


@dataclass(slots=True, eq=False)
class _Piece:
    """One sub-batch.

    Attributes:
        batch: Number of its batch.
        start, end: Its rows.
        states: Of random number generators before it was encoded.
        seen: Of each tensor that it was encoded to: rows, geometry, and what tells its bits.
    """

    batch: int
    start: int
    end: int
    states: RandomStates | None = None
    seen: list[tuple[int, tuple[Any, ...], Tensor]] = field(default_factory=list)


class _Cache:
    """Sub-batches, what they were encoded to, and how to encode them again.

    Attributes:
        leaves: Tensors of the batches that want a gradient.
    """

    def __init__(
        self, encode: Callable[..., Any], batches: Sequence[Any], pieces: list[_Piece], *, reduce_once: bool
    ) -> None:
        self._encode = encode
        self._batches = batches
        self._pieces = pieces
        self._reduce_once = reduce_once
        tensors = _tensors_in(batches)
        self._versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
        self.leaves = list({id(tensor): tensor for tensor in tensors if tensor.requires_grad}.values())
        self._autocast = Autocast(tensor.device.type for tensor in tensors)
        self._modules = Modules(len(batches))
        self._buffers: list[Buffer] = []
        self._reducers: dict[int, torch.nn.Module] = {}
        self._silent: set[int] = set()
        self._rests: list[Any] = [None] * len(batches)
        self._counts = [0] * len(batches)

    def embed(self, *, again: bool = False) -> list[Tensor]:
        """Encode every sub-batch without a graph.

        Args:
            again: Whether they will be encoded again.

        Returns:
            The tensors of all batches, one after the other.
        """
        found: list[list[list[Tensor]]] = [[] for _ in self._batches]
        for piece in self._pieces:
            piece.states = RandomStates() if again else None
            watched = self._modules.watch(self._encode, piece.batch) if again else contextlib.nullcontext()
            with torch.no_grad(), watched:
                output = _call(self._encode, rows_of(self._batches[piece.batch], piece.start, piece.end))
            tensors, rest = flattened(output)
            before = self._rests[piece.batch]
            if before is not None and before != rest:
                raise UsageError(
                    f"The encoder returned other structures for two sub-batches: {before[0]} and {rest[0]}. "
                    "Return embeddings only."
                )
            self._rests[piece.batch] = rest
            if again:
                piece.seen = [(len(tensor), meta(tensor), all_bits(tensor)) for tensor in tensors]
            found[piece.batch].append(tensors)
        self._buffers = self._modules.buffers() if again else []
        every = {key: module for modules in self._modules.called for key, module in modules.items()}
        self._reducers = {key: module for key, module in every.items() if reduces_gradients(module)}
        left_out = again and self._reduce_once and len(self._pieces) > 1
        if left_out and any(getattr(m, "static_graph", False) for m in self._reducers.values()):
            raise UsageError(
                "DDP with `static_graph=True` cannot leave out the reduction of some sub-batches: leave that out, or "
                "give `reduce_once=False`."
            )
        self._silent = {
            key
            for key, module in self._reducers.items()
            if isinstance(module, DistributedDataParallel) and not module.require_backward_grad_sync
        }
        flat = []
        for number, parts in enumerate(found):
            whole = together(parts)
            self._counts[number] = len(whole)
            flat += whole
        return flat

    def structured(self, flat: Sequence[Tensor]) -> list[Any]:
        """What `embed` returned, by batch, as ``encode`` returns it."""
        given = iter(flat)
        return [
            joined([next(given) for _ in range(count)], rest)
            for count, rest in zip(self._counts, self._rests, strict=True)
        ]

    def differentiate(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Encode every sub-batch again, the last one first, and differentiate it; returns the gradients of ``leaves``.

        Args:
            gradients: Of what `embed` returned.
        """
        for tensor, version in self._versions:
            if tensor._version != version:
                raise ChangedTensorError(
                    f"A tensor of shape {list(tensor.shape)} in a contrastive batch was written to after it had been "
                    "encoded: keep batches as they are until `backward()`, and have the encoder copy what it changes."
                )
        self._check_reduction()
        stand_ins = {id(leaf): leaf.detach().requires_grad_() for leaf in self.leaves}
        batches = [_replaced(batch, stand_ins) for batch in self._batches]
        given = iter(gradients)
        wanted = [[next(given) for _ in range(count)] for count in self._counts]
        starts = self._starts()
        order = [p for p in reversed(self._pieces) if any(g is not None for g in wanted[p.batch])]
        last = {
            key: place
            for place, piece in enumerate(order)
            for key in self._reducers
            if key in self._modules.called[piece.batch]
        }
        with same_random_numbers_afterwards(), same_afterwards(self._buffers):
            for place, piece in enumerate(order):
                own = [
                    None if whole is None else whole[start : start + seen[0]]
                    for whole, start, seen in zip(wanted[piece.batch], starts[id(piece)], piece.seen, strict=True)
                ]
                waiting = {key for key, end in last.items() if end > place and self._reduce_once}
                with unreduced(self._reducers[key] for key in waiting | self._silent):
                    self._again(piece, batches[piece.batch], own)
        return [stand_ins[id(leaf)].grad for leaf in self.leaves]

    def _check_reduction(self) -> None:
        """DDP reduces once the gradients of its parameters are there: the rest of this backward must add none."""
        for key in self._reducers.keys() - self._silent:
            module = self._reducers[key]
            if not isinstance(module, DistributedDataParallel):
                continue
            for name, parameter in module.module.named_parameters():
                if parameter.requires_grad and _is_reached(parameter):
                    raise ModelError(
                        f"The loss depends on `{name}` by cached embeddings and in another way too, so DDP would "
                        "reduce its gradient before it is there. Encode all batches of a step with "
                        "`cached_embeddings`, and keep parameters that the loss itself reads out of DDP."
                    )

    def _starts(self) -> dict[int, list[int]]:
        """By sub-batch: where its rows begin in each tensor of its batch."""
        ends = [[0] * count for count in self._counts]
        found = {}
        for piece in self._pieces:
            found[id(piece)] = list(ends[piece.batch])
            for number, (length, _, _) in enumerate(piece.seen):
                ends[piece.batch][number] += length
        return found

    def _again(self, piece: _Piece, batch: Any, gradients: list[Tensor | None]) -> None:
        """Encode one sub-batch with a graph, compare, and differentiate."""
        assert piece.states is not None
        piece.states.restore()
        with torch.enable_grad(), self._autocast.again():
            tensors, _ = flattened(_call(self._encode, rows_of(batch, piece.start, piece.end)))
        if len(tensors) != len(piece.seen) or not all(
            meta(tensor) == geometry and same_bits(tensor.detach(), bits)
            for tensor, (_, geometry, bits) in zip(tensors, piece.seen, strict=True)
        ):
            raise ChangedEmbeddingError(piece.batch, piece.start, piece.end)
        pairs = [
            (tensor, gradient)
            for tensor, gradient in zip(tensors, gradients, strict=True)
            if gradient is not None and tensor.requires_grad
        ]
        if pairs:
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])


class _Embed(torch.autograd.Function):
    """All sub-batches of a call; one input that wants a gradient makes that its outputs have one."""

    @staticmethod
    def forward(ctx: Any, cache: _Cache, start: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.cache = cache
        ctx.set_materialize_grads(False)
        found = cache.embed(again=True)
        ctx.mark_non_differentiable(*[t for t in found if not (t.is_floating_point() or t.is_complex())])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise ModelError(
                "The gradients of cached embeddings have no graph of their own: call `loss.backward()` without "
                "`create_graph=True`, or encode without `cached_embeddings`."
            )
        if not torch.autograd._is_checkpoint_valid():  # type: ignore[no-untyped-call]
            raise ModelError(
                "The gradients of cached embeddings go to `.grad` of what the encoder trains: call `loss.backward()` "
                "without `inputs=`, not `torch.autograd.grad`."
            )
        return None, None, *ctx.cache.differentiate(gradients)


def _is_reached(parameter: torch.nn.Parameter) -> bool:
    """Whether the backward that runs comes to a parameter."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    return bool(torch._C._will_engine_execute_node(node))


def _call(encode: Callable[..., Any], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return encode(**batch)
    return encode(*batch) if isinstance(batch, tuple) else encode(batch)


def _tensors_in(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, list | tuple):
        return []
    return [tensor for value in batch for tensor in _tensors_in(value)]


def _replaced(batch: Any, tensors: Mapping[int, Tensor]) -> Any:
    """A batch with other tensors in the places of some."""
    if not tensors:
        return batch
    if isinstance(batch, Tensor):
        return tensors.get(id(batch), batch)
    if isinstance(batch, Mapping):
        return {key: _replaced(value, tensors) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        items = [_replaced(value, tensors) for value in batch]
        if isinstance(batch, tuple) and hasattr(batch, "_fields"):
            return type(batch)(*items)
        return tuple(items) if isinstance(batch, tuple) else items
    return batch


__all__ = ["cached_embeddings", "gather_rows", "info_nce"]
