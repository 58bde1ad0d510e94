"""Gradient caching: the gradients of the same sub-batches in one graph, to the last bit; of the whole batch in fp64."""

from __future__ import annotations

import random
import re
from collections import UserDict, namedtuple
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfit
from memfit.contrastive import cached_embeddings, gather_rows, info_nce
from memfit.errors import ChangedEmbeddingError, ChangedTensorError, ModelError, UsageError

WIDTH, VOCABULARY = 16, 50


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(self.down(self.drop(F.gelu(self.up(x)))))


class Encoder(nn.Module):
    """Tokens to one normalized embedding a row."""

    def __init__(self, dropout=0.2, blocks=4, norm=False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(blocks))
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.unused = nn.Linear(3, 3)

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        if mask is not None:
            x = x * mask[..., None]
        return F.normalize(self.norm(x.mean(1)), dim=-1)


def encoder(**options):
    torch.manual_seed(1)
    return Encoder(**options).train()


def tokens(rows, seed=0, length=7):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), name
        assert value is None or torch.equal(found[name], value), name
    assert any(value is not None and value.abs().max() > 0 for value in expected.values())


def in_one_graph(encode, *batches, rows):
    """The plain way: the same sub-batches, all of them in one graph."""
    found = tuple(torch.cat([encode(part) for part in batch.split(rows)]) for batch in batches)
    return found[0] if len(batches) == 1 else found


def step(model, encodes, *, seed=5, backward=torch.Tensor.backward, batches=(8, 24), rows=4, loss_of=info_nce):
    """Loss and gradients of a step, and a random number drawn after it."""
    torch.manual_seed(seed)
    queries, passages = encodes(model, *(tokens(n, i) for i, n in enumerate(batches)), rows=rows)
    loss = loss_of(queries, passages)
    backward(loss)
    return loss.detach(), gradients(model), torch.rand(3)


def assert_same_step(found, expected):
    assert torch.equal(found[0], expected[0])
    assert_equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_sub_batches_in_one_graph(rows, dtype):
    """With dropout, bit for bit, and what is drawn afterwards too."""
    assert_same_step(
        step(encoder().to(dtype), cached_embeddings, rows=rows), step(encoder().to(dtype), in_one_graph, rows=rows)
    )


@pytest.mark.parametrize("rows", [1, 5, 8, 16])
def test_gradients_are_those_of_the_whole_batch(rows):
    """Without dropout; in fp64, where only the order of sums differs."""
    _, expected, _ = step(encoder(dropout=0.0).double(), in_one_graph, rows=1000)
    _, found, _ = step(encoder(dropout=0.0).double(), cached_embeddings, rows=rows)
    for name, value in expected.items():
        assert value is None or (found[name] - value).abs().max() <= 1e-12 * max(1.0, float(value.abs().max())), name


def test_dropout_is_on_in_these_tests():
    first, second = (step(encoder(), in_one_graph, seed=seed) for seed in (5, 6))
    assert not torch.equal(first[0], second[0])


def test_only_one_sub_batch_has_a_graph():
    """What autograd saves at any time is that of one sub-batch."""
    model, alive, most = encoder(), set(), []

    def encode(ids):
        h = model(ids)
        if h.requires_grad:
            alive.add(h.grad_fn)
            most.append(len(alive))
            h.register_hook(lambda gradient: alive.discard(h.grad_fn))
        return h

    cached_embeddings(encode, tokens(12), rows=3).square().sum().backward()
    assert most == [1, 1, 1, 1]


def test_a_batch_that_is_one_sub_batch_is_just_encoded():
    calls = []
    model = encoder()
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    cached_embeddings(model, tokens(4), rows=4).sum().backward()
    assert calls == [True]
    cached_embeddings(model, tokens(4), rows=3).sum().backward()
    assert calls == [True, False, False, True, True]


def test_without_gradients_sub_batches_are_encoded_once():
    model, calls = encoder(), []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.no_grad():
        found = cached_embeddings(model.eval(), tokens(4), rows=3)
    assert calls == [False, False]
    assert not found.requires_grad
    assert torch.equal(found, in_one_graph(model, tokens(4), rows=3))


def test_inference_mode():
    """Buffers that are made there have no versions."""

    class Scaled(Encoder):
        def forward(self, ids):
            self.register_buffer("scale", torch.ones(WIDTH))
            return super().forward(ids) * self.scale

    model = Scaled().eval()
    with torch.inference_mode():
        found = cached_embeddings(model, tokens(4), rows=3)
        assert torch.equal(found, in_one_graph(model, tokens(4), rows=3))


def test_embeddings_may_be_written_to():
    """They are a step's own, as an encoder's are."""

    def in_place(encodes):
        def run(*args, **options):
            found = encodes(*args, **options)
            for each in found:
                each.mul_(3).add_(0.5)
            return found

        return run

    assert_same_step(step(encoder(), in_place(cached_embeddings)), step(encoder(), in_place(in_one_graph)))


# What surrounds the forward -------------------------------------------------------------------------------------------


def test_autocast_is_there_again():
    """The second pass runs in the backward, where the loop's autocast is over; each weight is cast once a sub-batch."""

    def under_autocast(encodes):
        def run(model, *batches, rows):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return encodes(model, *batches, rows=rows)

        return run

    def one_by_one(model, *batches, rows):
        def encode(ids):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(ids)

        return in_one_graph(encode, *batches, rows=rows)

    found = step(encoder(), under_autocast(cached_embeddings))
    assert_same_step(found, step(encoder(), one_by_one))
    assert not torch.equal(found[0], step(encoder(), in_one_graph)[0]), "autocast changes nothing here"


def test_autocast_of_the_accelerator_where_the_batch_has_no_tensors(monkeypatch):
    """Texts lie on no device. MTIA, since its autocast can be entered anywhere."""
    from memfit.circumstances import Autocast

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("mtia"))
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: True)
    with torch.autocast("mtia", dtype=torch.bfloat16):
        then = Autocast()
    assert not torch.is_autocast_enabled("mtia")
    with then.again():
        assert torch.is_autocast_enabled("mtia")


@pytest.mark.parametrize("scale", [2.0**14, 0.25])
def test_a_scaled_loss_has_scaled_gradients(scale):
    def backward(loss):
        (loss * scale).backward()

    assert_same_step(
        step(encoder(), cached_embeddings, backward=backward), step(encoder(), in_one_graph, backward=backward)
    )


def test_grad_scaler():
    found = []
    for encodes in (cached_embeddings, in_one_graph):
        model = encoder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for seed in range(2):
            step(model, encodes, seed=seed, backward=lambda loss, s=scaler: s.scale(loss).backward())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(model.state_dict())
    assert_equal(*found)


def test_gradients_accumulate():
    """Two steps without `zero_grad`: the sums have another order, so in fp64."""
    found, expected = encoder().double(), encoder().double()
    for seed in (3, 4):
        step(found, cached_embeddings, seed=seed)
        step(expected, in_one_graph, seed=seed)
    for name, value in gradients(expected).items():
        assert value is None or torch.allclose(gradients(found)[name], value, rtol=0, atol=1e-13)


def test_two_encoders():
    def both(encodes):
        pair = nn.ModuleList([encoder(), encoder(blocks=2)])

        def run(model, queries, passages, rows):
            return encodes(model[0], queries, rows=rows), encodes(model[1], passages, rows=2 * rows)

        return step(pair, run)

    assert_same_step(both(cached_embeddings), both(in_one_graph))


def test_embeddings_that_the_loss_does_not_read():
    """Of a whole batch: it is not encoded again."""
    model, calls = encoder(), []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = step(model, cached_embeddings, loss_of=lambda queries, passages: queries.square().sum(0).amax())
    assert calls == 8 * [False] + 2 * [True]
    expected = step(encoder(), in_one_graph, loss_of=lambda queries, passages: queries.square().sum(0).amax())
    assert_same_step(found, expected)


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand, lambda: torch.rand(()).item()])
def test_random_numbers_of_python_and_numpy(draw):
    """Skipped layers, as LayerDrop has them."""

    class Skips(Encoder):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x) if draw() < 0.5 else x
            return x.mean(1)

    def run(encodes):
        random.seed(2)
        numpy.random.seed(2)
        torch.manual_seed(1)
        return (*step(Skips().train(), encodes), draw())

    found, expected = run(cached_embeddings), run(in_one_graph)
    assert found[3] == expected[3]
    assert torch.equal(found[0], expected[0])
    for name, value in expected[1].items():
        assert (value is None) == (found[1][name] is None)
        assert value is None or torch.allclose(found[1][name], value, rtol=1e-5, atol=1e-6)


def test_running_statistics_count_once():
    """Each sub-batch is normalized by its own mean, both times; what it adds to the running one is added once."""
    models = [encoder(norm=True) for _ in range(2)]
    found = [step(model, encodes) for model, encodes in zip(models, (cached_embeddings, in_one_graph), strict=True)]
    assert_same_step(*found)
    buffers = [dict(model.named_buffers()) for model in models]
    assert_equal(*buffers)
    assert buffers[0]["norm.num_batches_tracked"] == 8


def test_running_statistics_of_a_module_that_a_function_calls():
    models = [encoder(norm=True) for _ in range(2)]
    for model, encodes in zip(models, (cached_embeddings, in_one_graph), strict=True):
        step(model, lambda m, *batches, encodes=encodes, **options: encodes(lambda ids: m(ids), *batches, **options))
    assert_equal(*(dict(model.named_buffers()) for model in models))


# Structures -----------------------------------------------------------------------------------------------------------


def test_structures_of_batches_and_embeddings():
    model = encoder(dropout=0.0)
    Pair = namedtuple("Pair", "ids mask")

    def encode(ids, extra, texts, scale, flag):
        assert flag is True
        assert len(texts) == len(ids) == len(extra.mask)
        h = model(ids, extra.mask) * scale
        return {"dense": h, "nested": (h[:, :2], None), "lengths": torch.tensor([len(t) for t in texts]), "name": "x"}

    batch = UserDict(
        ids=tokens(5), extra=Pair(tokens(5), torch.ones(5, 7)), texts=list("abcde"), scale=torch.tensor(2.0), flag=True
    )
    found = cached_embeddings(encode, batch, rows=2)
    expected = encode(**batch)
    assert list(found) == list(expected)
    assert torch.allclose(found["dense"], expected["dense"])
    assert found["nested"][1] is None
    assert found["name"] == "x"
    assert torch.equal(found["lengths"], expected["lengths"])
    assert not found["lengths"].requires_grad
    (found["dense"].sum() + found["nested"][0].square().sum()).backward()
    first = gradients(model)
    model.zero_grad()
    (expected["dense"].sum() + expected["nested"][0].square().sum()).backward()
    for name, value in gradients(model).items():
        assert value is None or torch.allclose(first[name], value, atol=1e-5)


def test_a_tuple_is_passed_as_positions():
    model = encoder()
    mask = torch.ones(6, 7)
    mask[:, 4:] = 0
    assert torch.equal(
        cached_embeddings(model.eval(), (tokens(6), mask), rows=2),
        cached_embeddings(model, {"ids": tokens(6), "mask": mask}, rows=2),
    )


def test_several_vectors_a_row():
    """As of late interaction: all tokens of all rows."""
    model = encoder(dropout=0.0).double()
    found = cached_embeddings(lambda ids: model.embed(ids).flatten(0, 1), tokens(5), rows=2)
    assert found.shape == (35, WIDTH)
    found.square().sum().backward()
    first = gradients(model)["embed.weight"]
    model.zero_grad()
    model.embed(tokens(5)).square().sum().backward()
    assert torch.allclose(first, model.embed.weight.grad)


def test_inputs_get_their_gradients():
    """Embedded elsewhere, as soft prompts are."""
    model, table = encoder(), nn.Parameter(torch.randn(6, 7, WIDTH))

    def encode(x):
        for block in model.blocks:
            x = block(x)
        return x.mean(1)

    found = []
    for encodes in (cached_embeddings, in_one_graph):
        torch.manual_seed(3)
        model.zero_grad()
        table.grad = None
        encodes(encode, table * 2, rows=2).square().sum().backward()
        found.append({**gradients(model), "table": table.grad.clone()})
    assert_equal(*found)


# Never a wrong gradient -----------------------------------------------------------------------------------------------


def test_other_embeddings_the_second_time_are_an_error():
    model, count = encoder(), iter(range(100))
    loss = cached_embeddings(lambda ids: model(ids) + next(count), tokens(4), rows=2).sum()
    with pytest.raises(ChangedEmbeddingError, match=r"Rows 2 to 3 of batch 0 .* default generators"):
        loss.backward()
    assert all(gradient is None for gradient in gradients(model).values())


def test_a_generator_of_its_own_is_an_error():
    model, own = encoder(), torch.Generator().manual_seed(0)
    loss = cached_embeddings(lambda ids: model(ids) * torch.rand((), generator=own), tokens(4), rows=2).sum()
    with pytest.raises(ChangedEmbeddingError):
        loss.backward()


def test_weights_that_changed_are_an_error():
    model = encoder()
    loss = cached_embeddings(model, tokens(4), rows=2).sum()
    with torch.no_grad():
        model.embed.weight.mul_(2)
    with pytest.raises(ChangedEmbeddingError):
        loss.backward()


def test_a_counter_that_the_encoder_reads_is_an_error():
    class Counts(Encoder):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, ids):
            self.count += 1
            return super().forward(ids) * self.count

    model = Counts()
    loss = cached_embeddings(model, tokens(4), rows=2).sum()
    with pytest.raises(ChangedEmbeddingError):
        loss.backward()
    assert model.count == 2


def test_batches_that_changed_are_an_error():
    model, ids = encoder(), tokens(4)
    loss = cached_embeddings(model, ids, rows=2).sum()
    ids.zero_()
    with pytest.raises(ChangedTensorError, match="written to"):
        loss.backward()


def test_an_error_leaves_random_numbers_and_buffers_alone():
    model, count = encoder(norm=True), iter(range(100))
    loss = cached_embeddings(lambda ids: model(ids) + next(count), tokens(4), rows=2).sum()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    with pytest.raises(ChangedEmbeddingError):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(dict(model.named_buffers()), before)


@pytest.mark.parametrize("way", ["grad", "inputs"])
def test_other_ways_to_differentiate_are_an_error(way):
    """They would leave the encoder's own gradients out."""
    model, x = encoder(), torch.randn(4, 7, WIDTH, requires_grad=True)
    loss = cached_embeddings(lambda x: model.blocks[0](x).mean(1), x, rows=2).sum()
    with pytest.raises(ModelError, match=r"go to `\.grad`"):
        torch.autograd.grad(loss, [x]) if way == "grad" else loss.backward(inputs=[x])


def test_second_derivatives_are_an_error():
    """Silently left out, a gradient penalty would be another one."""
    model = encoder()
    loss = cached_embeddings(model, tokens(4), rows=2).square().sum()
    with pytest.raises(ModelError, match="create_graph=True"):
        loss.backward(create_graph=True)
    assert all(gradient is None for gradient in gradients(model).values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(cached_embeddings, Encoder(), tokens(4), rows=0), "`rows=0` is no number"),
        (partial(cached_embeddings, Encoder(), tokens(4), rows=True), "`rows=True` is no number"),
        (partial(cached_embeddings, Encoder(), rows=2), "There is no batch"),
        (partial(cached_embeddings, Encoder(), tokens(0), rows=2), "the batch has no rows"),
        (partial(cached_embeddings, Encoder(), {"ids": 3}, rows=2), "the batch has no rows"),
        (
            partial(cached_embeddings, Encoder(), tokens(4), {"ids": tokens(4), "mask": tokens(3)}, rows=2),
            r"batch 1\['ids'\] has 4 rows and batch 1\['mask'\] has 3",
        ),
        (partial(cached_embeddings, lambda ids: ids.sum(), tokens(4), rows=2), "a tensor without rows"),
        (partial(cached_embeddings, lambda ids: None, tokens(4), rows=2), "without a tensor in it"),
        (partial(cached_embeddings, lambda ids: (ids, object()), tokens(4), rows=2), "an object of object"),
        (partial(cached_embeddings, lambda ids: ids[:, : len(ids)], tokens(3), rows=2), r"\[2, 2\], \[1, 1\]"),
        (partial(cached_embeddings, lambda ids: (ids,) * len(ids), tokens(3), rows=2), "other structures"),
        (partial(info_nce, torch.ones(2, 3), torch.ones(3, 3)), "3 passages are no multiple of 2 queries"),
        (partial(info_nce, torch.ones(2, 3), torch.ones(2, 3), temperature=0), "`temperature=0` is not above 0"),
        (partial(gather_rows, torch.ones(())), "has no rows to gather"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UsageError, match=message):
        call()


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_info_nce(dtype):
    queries = F.normalize(torch.randn(3, 8), dim=-1).to(dtype)
    passages = F.normalize(torch.randn(6, 8), dim=-1).to(dtype)
    loss = info_nce(queries, passages, temperature=0.5)
    scores = (queries @ passages.T / 0.5).double()
    expected = -torch.stack([scores[i, 2 * i] - torch.logsumexp(scores[i], 0) for i in range(3)]).mean()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(gather_rows(queries), queries), "without other ranks there is nothing to gather"
    assert torch.equal(info_nce(queries, passages, temperature=0.5, negatives_cross_device=True), loss)


def test_the_page_runs_as_it_stands():
    """Its first block, whole."""
    page = (Path(__file__).parent.parent / "docs" / "contrastive.md").read_text(encoding="utf-8")
    found = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], found)
    assert found["loss"].isfinite()
    assert found["q"].shape == (32, 64)
    assert found["p"].shape == (256, 64)


# A fitted model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"policy": "full"}, {"budget": "min"}, {"every_n_layers": 2}], ids=str)
def test_a_fitted_model(options):
    """Sub-batches are planned as steps are; what is encoded without a graph is left alone."""
    found = []
    for fits in (True, False):
        model = encoder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        handle = memfit.fit(model, **options) if fits else None
        steps = []
        for seed in range(4):
            steps.append(step(model, cached_embeddings if fits else in_one_graph, seed=seed))
            optimizer.step()
            optimizer.zero_grad()
        found.append(steps)
        if handle is not None:
            summary = handle.summary()
            assert {block["mode"] for block in summary["blocks"]} == {"replay"}
            assert summary["recomputed_bytes"] > 0
            handle.remove()
    for mine, theirs in zip(*found, strict=True):
        assert_same_step(mine, theirs)
