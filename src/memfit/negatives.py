"""The contrastive loss, and the rows of other ranks as negatives, with exact gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from memfit.errors import RankError, UsageError


def gather_rows(rows: Tensor, *, group: Any = None) -> Tensor:
    """The rows of all ranks, those of rank 0 first.

    Its gradient is exact: each rank's rows get what the losses of all ranks say of them. So where DDP or FSDP average
    the gradients of parameters, those of the mean of the ranks' losses come out; it does not matter whether each rank's
    loss is of its own rows or of all.

    Args:
        rows: ``(rows, ...)``, of the same shape on all ranks.
        group: The ranks; all by default. Without a process group there is one.

    Raises:
        RankError: On all ranks, if their shapes differ.
        UsageError: ``rows`` has no first dimension.
    """
    if rows.dim() == 0:
        raise UsageError("A tensor without dimensions has no rows to gather.")
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return rows
    found: Tensor = _GatherRows.apply(rows, group)  # type: ignore[no-untyped-call]
    return found


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.length = group, len(rows)
        world = dist.get_world_size(group)
        _check_shapes(rows, group, world)
        whole = rows.new_empty(world, *rows.shape)
        dist.all_gather(list(whole.unbind(0)), rows.contiguous(), group=group)
        return whole.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.length
        return total[start : start + ctx.length].clone(), None


def _check_shapes(rows: Tensor, group: Any, world: int) -> None:
    own = torch.zeros(8, dtype=torch.int64, device=rows.device)
    own[0] = rows.dim()
    own[1 : 1 + min(7, rows.dim())] = torch.tensor(rows.shape[:7], device=rows.device)
    every = own.new_empty(world, 8)
    dist.all_gather(list(every.unbind(0)), own, group=group)
    shapes = [row[1 : 1 + row[0]] for row in every.tolist()]
    for rank, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise RankError(
                rank,
                f"Rank 0 has rows of shape {shapes[0]} to gather, rank {rank} has {shape}: give every rank as many, as "
                "`drop_last=True` of the data loader does.",
            )


def info_nce(
    queries: Tensor,
    passages: Tensor,
    *,
    temperature: float = 0.02,
    negatives_cross_device: bool = False,
    group: Any = None,
) -> Tensor:
    """Cross-entropy of each query's own passage among all passages, in fp32 or wider; similarities are dot products.

    Args:
        queries: ``(queries, size)``, normalized if cosines are meant.
        passages: ``(queries * n, size)``: of each query in turn, its own passage and then ``n - 1`` negatives.
        temperature: That similarities are divided by.
        negatives_cross_device: Whether the passages of other ranks are negatives too.
        group: These ranks; all by default.

    Returns:
        The mean over this rank's queries. Under DDP and FSDP, which average gradients over ranks, that trains on the
        mean over all queries.

    Raises:
        UsageError: The number of passages is no multiple of that of queries, or the temperature is not above 0.
        RankError: On all ranks, if they have not as many passages.
    """
    if not len(queries) or not len(passages) or len(passages) % len(queries):
        raise UsageError(f"{len(passages)} passages are no multiple of {len(queries)} queries.")
    if not temperature > 0:
        raise UsageError(f"`temperature={temperature}` is not above 0.")
    each = len(passages) // len(queries)
    start = 0
    if negatives_cross_device and dist.is_available() and dist.is_initialized():
        start = dist.get_rank(group) * len(passages)
        passages = gather_rows(passages, group=group)
    scores = queries @ passages.T / temperature
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    own = start + each * torch.arange(len(queries), device=scores.device)
    return torch.nn.functional.cross_entropy(scores, own)


__all__ = ["gather_rows", "info_nce"]
