"""Gradient caching on two ranks: DDP and FSDP2, the negatives of both; gradients reduced once, to the last bit."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import memfit
from memfit.contrastive import cached_embeddings, gather_rows, info_nce
from ranks import CLASSES, Block, Outcome, in_turn, run, values, whole

RANKS, QUERIES, PASSAGES, STEPS = 2, 4, 12, 3


class Encoder(nn.Module):
    """Tokens to one normalized embedding a row."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 32)
        self.blocks = nn.ModuleList(Block(dropout=dropout) for _ in range(3))
        self.other = nn.Linear(32, 32)
        self.register_buffer("shift", torch.ones(32))
        self.uses_other = True

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.shift
        for block in self.blocks:
            x = block(x)
        x = x.mean(1)
        return F.normalize(x + self.other(x) if self.uses_other else x, dim=-1)


def encoder(dropout: float = 0.1) -> Encoder:
    torch.manual_seed(7)
    return Encoder(dropout).train()


def batches(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    queries = torch.randint(0, CLASSES, (QUERIES, 9), generator=generator)
    return queries, torch.randint(0, CLASSES, (PASSAGES, 9), generator=generator)


def cached(model: nn.Module, *given: Tensor, rows: int, **options: Any) -> Any:
    return cached_embeddings(model, *given, rows=rows, **options)


def in_one_graph(model: nn.Module, *given: Tensor, rows: int) -> Any:
    return tuple(torch.cat([model(part) for part in batch.split(rows)]) for batch in given)


def separately(model: nn.Module, *given: Tensor, rows: int) -> Any:
    return tuple(cached_embeddings(model, batch, rows=rows) for batch in given)


def in_one_piece(model: nn.Module, queries: Tensor, passages: Tensor, rows: int) -> Any:
    """Queries are few enough to be one sub-batch."""
    return cached_embeddings(model, queries, rows=2 * rows), cached_embeddings(model, passages, rows=rows)


def whole_queries(model: nn.Module, queries: Tensor, passages: Tensor, rows: int) -> Any:
    return model(queries), *in_one_graph(model, passages, rows=rows)


def beside(model: nn.Module, queries: Tensor, passages: Tensor, rows: int) -> Any:
    """Queries with a graph of their own."""
    return model(queries), cached_embeddings(model, passages, rows=rows)


def all_scores(queries: Tensor, passages: Tensor) -> Tensor:
    """The loss of all queries on each rank, as FlagEmbedding has it."""
    return info_nce(gather_rows(queries), gather_rows(passages), temperature=0.1)


def own_scores(queries: Tensor, passages: Tensor) -> Tensor:
    """That of the rank's own queries."""
    return info_nce(queries, passages, temperature=0.1, negatives_cross_device=True)


Encodes = Callable[..., Any]
Wrap = Callable[[Any], nn.Module]


@contextlib.contextmanager
def counted(count: Counter[str]) -> Iterator[None]:
    """Counts what is reduced: buckets of DDP, and FSDP2's reduce-scatters."""
    names = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name)]
    originals = {name: getattr(dist, name) for name in names}

    def counting(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        count["reduced"] += 1
        return original(*args, **kwargs)

    for name, original in originals.items():
        setattr(dist, name, partial(counting, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def train(
    wrap: Wrap,
    encodes: Encodes,
    *,
    loss_of: Callable[[Tensor, Tensor], Tensor] = own_scores,
    accumulate: bool = False,
    fits: bool = False,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Losses and gradients of a few steps, and how often gradients were reduced in the last one."""
    model = encoder()
    handle = memfit.fit(model, policy="full") if fits else None
    wrapped = wrap(model)
    count: Counter[str] = Counter()
    if isinstance(wrapped, DDP):
        hook = wrapped.register_comm_hook

        def reduce(state, bucket):  # type: ignore[no-untyped-def]  # torch compares the annotations
            count["reduced"] += 1
            work = dist.all_reduce(bucket.buffer().div_(RANKS), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        hook(None, reduce)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    found = []
    for step in range(STEPS):
        kept: dict[str, Any] = {}
        count.clear()
        with counted(count):
            if accumulate:
                with wrapped.no_sync():
                    encodes_loss(wrapped, encodes, loss_of, 50 + step).backward()
            loss = encodes_loss(wrapped, encodes, loss_of, step)
            loss.backward()
        kept["loss"] = loss.detach()
        kept.update({name: whole(p.grad) for name, p in wrapped.named_parameters()})
        found.append(kept)
        optimizer.step()
        optimizer.zero_grad()
    if handle is not None:
        assert {block["mode"] for block in handle.summary()["blocks"]} == {"replay"}
        assert handle.summary()["recomputed_bytes"] > 0
        handle.remove()
    return found, count


def encodes_loss(wrapped: Any, encodes: Encodes, loss_of: Callable[..., Tensor], step: int) -> Tensor:
    return loss_of(*encodes(wrapped, *batches(step, dist.get_rank()), rows=3))


def unused(model: Any) -> nn.Module:
    model.uses_other = False
    return DDP(model, find_unused_parameters=True)


def static(model: nn.Module) -> nn.Module:
    return DDP(model, static_graph=True)


def sharded(model: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model  # type: ignore[no-any-return]


COMPARED: dict[str, tuple[Wrap, Encodes, dict[str, Any]]] = {
    "ddp": (DDP, cached, {}),
    "ddp, all scores": (DDP, cached, {"loss_of": all_scores}),
    "ddp, unused": (unused, cached, {}),
    "ddp, static, every": (static, partial(cached, reduce_once=False), {}),
    "ddp, accumulate": (DDP, cached, {"accumulate": True}),
    "ddp, separately": (DDP, separately, {}),
    "ddp, in one piece": (DDP, in_one_piece, {}),
    "ddp, every": (DDP, partial(cached, reduce_once=False), {}),
    "fsdp": (sharded, cached, {}),
    "fsdp, all scores": (sharded, cached, {"loss_of": all_scores}),
    "fsdp, in one piece": (sharded, in_one_piece, {}),
    "fsdp, beside": (sharded, beside, {}),
    "fsdp, every": (sharded, partial(cached, reduce_once=False), {}),
    "ddp, fitted": (DDP, cached, {"fits": True}),
    "fsdp, fitted": (sharded, cached, {"fits": True}),
}


def difference(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """The largest, in parts of each tensor's largest element."""
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            if (value is None) != (mine[name] is None):
                return float("inf")
            if value is not None:
                worst = max(worst, float((mine[name] - value).abs().max() / value.abs().max().clamp(min=1e-30)))
    return worst


def compare(name: str) -> dict[str, Any]:
    wrap, encodes, options = COMPARED[name]
    plain = {key: value for key, value in options.items() if key != "fits"}
    expected, once = train(wrap, whole_queries if encodes in (in_one_piece, beside) else in_one_graph, **plain)
    found, count = train(wrap, encodes, **options)
    return {"difference": difference(found, expected), "reduced": count["reduced"], "once": once["reduced"]}


def whole_batch() -> dict[str, float]:
    """Against one process that has the rows of both ranks, and no sub-batches; in fp64."""
    reference = encoder(dropout=0.0).double()
    rows = [batches(0, rank) for rank in range(RANKS)]
    queries, passages = (reference(torch.cat(parts)) for parts in zip(*rows, strict=True))
    expected = info_nce(queries, passages, temperature=0.1)
    expected.backward()
    found = {}
    for name, wrap in (("ddp", DDP), ("fsdp", sharded)):
        for loss_of in (own_scores, all_scores):
            model = wrap(encoder(dropout=0.0).double())
            loss = loss_of(*cached(model, *batches(0, dist.get_rank()), rows=3))
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            worst = abs(float(total) / RANKS - float(expected.detach()))
            for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
                gradient: Any = parameter.grad
                gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                worst = max(worst, float((gradient - other.grad).abs().max()))
            found[f"{name}, {loss_of.__name__}"] = worst
    return found


def static_graph() -> str:
    try:
        encodes_loss(static(encoder()), cached, own_scores, 0)
    except memfit.MemfitError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def reduced_too_early() -> str:
    try:
        encodes_loss(DDP(encoder()), beside, own_scores, 0).backward()
    except memfit.MemfitError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def uneven() -> str:
    try:
        gather_rows(torch.ones(2 + dist.get_rank(), 3))
    except memfit.MemfitError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


SCENARIOS: dict[str, Callable[[], Any]] = {
    **{name: partial(compare, name) for name in COMPARED},
    "whole batch": whole_batch,
    "uneven": uneven,
    "static graph": static_graph,
    "reduced too early": reduced_too_early,
}


def play(names: list[str]) -> dict[str, Outcome]:
    return in_turn(SCENARIOS, names)


@pytest.fixture(scope="module")
def outcomes() -> Callable[[str], list[Any]]:
    """What a scenario came to on each rank; all run in the same two processes."""
    found = run(play, list(SCENARIOS), ranks=RANKS)
    return lambda name: values([outcome if outcome.value is None else outcome.value[name] for outcome in found])


@pytest.mark.parametrize("name", COMPARED)
def test_gradients_are_those_of_the_sub_batches_in_one_graph(outcomes, name):
    """With dropout. Bit for bit where sums are made in the same order; with each sub-batch reduced, or accumulated
    onto others, within rounding of fp32."""
    for found in outcomes(name):
        exact = name in (
            "ddp",
            "ddp, all scores",
            "ddp, unused",
            "ddp, fitted",
            "fsdp",
            "fsdp, all scores",
            "fsdp, fitted",
        )
        assert found["difference"] <= (0.0 if exact else 1e-4)
        if "every" in name:
            assert found["reduced"] > found["once"]
        elif any(word in name for word in ("separately", "piece", "beside")):
            assert found["reduced"] == 2 * found["once"] > 0
        else:
            assert found["reduced"] == found["once"] > 0


def test_gradients_are_those_of_one_process_with_the_whole_batch(outcomes):
    for found in outcomes("whole batch"):
        assert len(found) == 4
        assert max(found.values()) < 1e-12


def test_a_static_graph_reduces_in_every_backward(outcomes):
    for found in outcomes("static graph"):
        assert found.startswith("UsageError: DDP with `static_graph=True`")
        assert "`reduce_once=False`" in found


def test_embeddings_beside_cached_ones_are_an_error_under_ddp(outcomes):
    """DDP would reduce the gradients of one of them only, and ranks would train on different ones."""
    for found in outcomes("reduced too early"):
        assert found.startswith(
            "ModelError: The loss depends on `embed.weight` by cached embeddings and in another way"
        )


def test_unequal_numbers_of_rows_are_an_error_on_all_ranks(outcomes):
    for found in outcomes("uneven"):
        assert found.startswith("RankError: Rank 0 has rows of shape [2, 3] to gather, rank 1 has [3, 3]")
