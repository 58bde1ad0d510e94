"""The chunked loss: gradients of the plain one, without its logits."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memfit
from memfit import linear_cross_entropy
from memfit.chunked import MAX_CHUNK_TOKENS, MIN_CHUNK_TOKENS, choose_chunk_tokens
from memfit.errors import ChangedTensorError, UsageError
from memfit.logits import DeferredLogits, defer
from memfit.profiles import BlockCall, ProgramProfile, StepEvent, StepProfile
from memfit.solver.losses import pays, with_chunked_loss
from zoo import VOCAB, Case, build, decoder_shape

Grads = dict[str, Tensor]


def plain_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float | None = None,
    num_items: float | None = None,
) -> Tensor:
    """The same by torch, with all logits."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits.reshape(-1, len(weight)),
        labels.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="mean" if num_items is None else "sum",
    )
    return loss if num_items is None else loss / num_items


def inputs(
    *, tokens: int = 120, vocab: int = 211, size: int = 24, dtype: torch.dtype = torch.float32, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states, weight, labels with a quarter of them ignored, bias."""
    hidden = torch.randn(tokens, size).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, size) * 0.3).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,))
    labels[: tokens // 4] = -100
    return hidden, weight, labels, torch.randn(vocab).to(dtype).requires_grad_() if bias else None


def results(loss: Callable[..., Tensor], tensors: tuple[Any, ...], factor: float = 1.0, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of all that requires them."""
    hidden, weight, labels, bias = tensors
    value = loss(hidden, weight, labels, bias=bias, **options)
    wanted = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value * factor, wanted)]


def in_double(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers in fp64."""
    return tuple(
        t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for t in tensors
    )


def assert_within_ulps(found: list[Tensor], plain: list[Tensor], exact: list[Tensor], ulps: float = 8.0) -> None:
    """No element is farther from the truth than the plain loss's worst, but for a few ulp of the largest."""
    for own, other, truth in zip(found, plain, exact, strict=True):
        assert own.dtype == other.dtype
        assert own.shape == other.shape
        largest = truth.abs().max()
        limit = (other.double() - truth).abs().max() + ulps * torch.finfo(own.dtype).eps * largest
        assert (own.double() - truth).abs().max() <= limit


# The function --------------------------------------------------------------------------------------------------------

GRID = list(itertools.product([0.0, 0.1, 1.0], [None, 3.0], [None, 0.5], [None, 17.0], [False, True]))


@pytest.mark.parametrize(("smoothing", "softcap", "scale", "num_items", "bias"), GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradients_are_those_of_the_plain_loss(dtype, smoothing, softcap, scale, num_items, bias):
    tensors = inputs(dtype=dtype, bias=bias)
    options = {"label_smoothing": smoothing, "softcap": softcap, "scale": scale, "num_items": num_items}
    plain = results(plain_loss, tensors, **options)
    exact = results(plain_loss, in_double(tensors), **options)
    for chunk_tokens in (1, 32, 120, 500):
        found = results(linear_cross_entropy, tensors, chunk_tokens=chunk_tokens, **options)
        assert_within_ulps(found, plain, exact)


@pytest.mark.parametrize("factor", [1.0, 0.5, 1 / 3])
def test_bf16_is_no_farther_from_fp64_than_the_plain_loss(factor):
    """The same roundings before, and the head's gradient is rounded once at the end instead of in every chunk."""
    tensors = inputs(tokens=1000, vocab=2000, size=64, dtype=torch.bfloat16, bias=True)
    plain = results(plain_loss, tensors, factor)
    exact = results(plain_loss, in_double(tensors), factor)
    found = results(linear_cross_entropy, tensors, factor, chunk_tokens=64)
    for own, other, truth in zip(found, plain, exact, strict=True):
        # An incoming gradient that is no power of two costs hidden states one more rounding of their gradient.
        allowed = 1.01 if factor != 1 / 3 else 1.35
        assert (own.double() - truth).norm() <= allowed * (other.double() - truth).norm() + 1e-7 * truth.norm()


def test_fp16_gradients_do_not_underflow_before_loss_scaling():
    """A scaler's factor comes with the incoming gradient; divided by the tokens first, they would be 0."""
    tensors = inputs(tokens=4096, vocab=500, size=16, dtype=torch.float16)
    plain = results(plain_loss, tensors, 4096.0)
    exact = results(plain_loss, in_double(tensors), 4096.0)
    found = results(linear_cross_entropy, tensors, 4096.0, chunk_tokens=512)
    for own, other, truth in zip(found, plain, exact, strict=True):
        # Hidden states are rounded twice.
        assert (own.double() - truth).norm() <= 1.25 * (other.double() - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("frozen", [(0,), (1,), (3,), (0, 3), (1, 3), (0, 1)])
def test_what_is_frozen_gets_no_gradient(frozen):
    tensors = inputs(bias=True)
    for place in frozen:
        tensors[place].requires_grad_(False)
    plain = results(plain_loss, tensors)
    found = results(linear_cross_entropy, tensors, chunk_tokens=32)
    assert_within_ulps(found, plain, [t.double() for t in plain])
    assert len(found) == 4 - len(frozen)


def test_nothing_to_differentiate():
    hidden, weight, labels, _ = inputs()
    expected = plain_loss(hidden, weight, labels)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=32)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), labels).requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_items", [None, 5.0, torch.tensor(5)])
@pytest.mark.parametrize("tokens", [6, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_label_that_counts(dtype, tokens, num_items, smoothing):
    """All ignored, or no token at all: torch's value, and no gradient."""
    hidden, weight, labels, _ = inputs(tokens=tokens, dtype=dtype)
    tensors = (hidden, weight, labels.fill_(-100), None)
    plain = results(plain_loss, tensors, num_items=num_items, label_smoothing=smoothing)
    found = results(linear_cross_entropy, tensors, num_items=num_items, label_smoothing=smoothing, chunk_tokens=4)
    for own, other in zip(found, plain, strict=True):
        torch.testing.assert_close(own, other, equal_nan=True)


def test_shapes_and_strides():
    """Any leading shape, contiguous or not; another index may be ignored."""
    hidden = torch.randn(24, 5, 7).permute(1, 2, 0).requires_grad_()
    weight = torch.randn(24, 31).t().requires_grad_()
    labels = torch.randint(31, (7, 5)).t()
    assert not hidden.is_contiguous()
    tensors = (hidden, weight, labels, None)
    plain = results(plain_loss, tensors, ignore_index=3)
    exact = results(plain_loss, in_double(tensors), ignore_index=3)
    assert_within_ulps(results(linear_cross_entropy, tensors, ignore_index=3, chunk_tokens=4), plain, exact)
    one = (hidden.detach()[0, 0].clone().requires_grad_(), weight, torch.tensor(4), None)
    assert_within_ulps(
        results(linear_cross_entropy, one), results(plain_loss, one), results(plain_loss, in_double(one))
    )


def test_extreme_logits():
    """Masked classes (-inf), and probabilities that are 0 in fp32."""
    hidden, weight, labels, _ = inputs()
    bias = torch.zeros(len(weight))
    bias[5:9] = -torch.inf
    labels[(labels >= 5) & (labels < 9)] = 0
    with torch.no_grad():
        weight *= 200
    plain = results(plain_loss, (hidden, weight, labels, bias))
    found = results(linear_cross_entropy, (hidden, weight, labels, bias), chunk_tokens=32)
    assert all(t.isfinite().all() for t in found)
    assert_within_ulps(found, plain, [t.double() for t in plain])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_autocast(dtype, bias):
    """The head computes in autocast's dtype, and gradients are in that of what they are of."""
    tensors = inputs(tokens=600, vocab=800, bias=bias)
    with torch.autocast("cpu", dtype):
        plain = results(plain_loss, tensors)
        found = results(linear_cross_entropy, tensors, chunk_tokens=64)
        assert torch.is_autocast_enabled("cpu")
    exact = results(plain_loss, in_double(tensors))
    for own, other, truth in zip(found, plain, exact, strict=True):
        assert own.dtype == torch.float32
        assert (own.double() - truth).norm() <= 1.02 * (other.double() - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_is_kept_can_be_walked_again(dtype):
    """Backward after backward gives the same; and gradients accumulate."""
    hidden, weight, labels, bias = inputs(dtype=dtype, bias=True)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=32) * 0.3
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    copies = [t.clone() for t in first]
    second = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    loss.backward()
    for one, copy_, two, third in zip(first, copies, second, (hidden, weight, bias), strict=True):
        assert torch.equal(one, copy_)
        assert torch.equal(one, two)
        assert torch.equal(one, third.grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradients_are_handed_over_not_copied():
    """The head's gradient is the sum itself: a copy would be a second one."""
    hidden, weight, labels, _ = inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    place = loss.grad_fn.saved_tensors[-1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == place


def test_second_derivatives_are_refused():
    hidden, weight, labels, _ = inputs()
    first = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    again = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(UsageError, match="no second derivative"):
        (hidden.sum() + again[0].square().sum()).backward()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.randn(9, 5)}, ["`weight` [9, 5]", "hidden size"]),
        ({"labels": torch.zeros(5, dtype=torch.long)}, ["`labels` [5]", "one label"]),
        ({"labels": torch.zeros(120)}, ["torch.float32", "int64"]),
        ({"bias": torch.zeros(5)}, ["`bias` [5]"]),
        ({"label_smoothing": 1.5}, ["`label_smoothing=1.5`"]),
        ({"softcap": 0.0}, ["`softcap=0.0`"]),
        ({"chunk_tokens": 0}, ["`chunk_tokens=0`"]),
        ({"weight": torch.zeros(211, 24, dtype=torch.float64)}, ["torch.float32", "torch.float64", "autocast"]),
    ],
)
def test_what_does_not_go_together_is_refused(change, words):
    hidden, weight, labels, _ = inputs()
    with pytest.raises(UsageError) as error:
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "labels": labels} | change))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("label", [211, -1])
def test_labels_out_of_range(label):
    hidden, weight, labels, _ = inputs()
    labels[60] = label
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels)


# Memory --------------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes that were alive in storages which operators made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return result


def loss_peak(
    chunked: bool, *, tokens: int, vocab: int, size: int, dtype: torch.dtype, trains: bool, device: str = "cpu"
) -> int:
    """Bytes of one loss and its backward, the head's gradient aside."""
    hidden = torch.empty(tokens, size, dtype=dtype, requires_grad=True, device=device)
    weight = torch.empty(vocab, size, dtype=dtype, requires_grad=trains, device=device)
    labels = torch.zeros(tokens, dtype=torch.long, device=device)
    with Peak() as peak:
        if chunked:
            linear_cross_entropy(hidden, weight, labels).backward()
        else:
            logits = F.linear(hidden, weight)  # a model returns them
            F.cross_entropy(logits.float(), labels).backward()
            del logits
    # A head in bf16 has its gradient summed in fp32.
    return peak.bytes - trains * vocab * size * (4 if chunked else dtype.itemsize)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4096, 8192])
def test_peak_at_128k_vocabulary_and_8k_tokens(size, dtype, trains):
    """The same code on tensors without memory: under 5% of the plain loss's."""
    shape = {"tokens": 8192, "vocab": 131072, "size": size, "dtype": dtype, "trains": trains, "device": "meta"}
    plain, chunked = loss_peak(False, **shape), loss_peak(True, **shape)
    assert plain >= 10 * 2**30
    assert chunked < 0.05 * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_of_real_tensors(dtype):
    """As it is without memory, and a tenth of the plain one's already where chunks are as short as they get."""
    shape = {"tokens": 2048, "vocab": 8192, "size": 32, "dtype": dtype, "trains": True}
    with FakeTensorMode():
        expected = [loss_peak(chunked, **shape) for chunked in (False, True)]
    found = [loss_peak(chunked, **shape) for chunked in (False, True)]
    assert found == pytest.approx(expected, rel=0.01)  # scalars: the check for a gradient of one
    assert found[1] < 0.1 * found[0]


def test_chunks():
    """As long as fits, whole multiples of 64, never longer than the batch."""
    assert choose_chunk_tokens(8192, 131072, 4096, torch.bfloat16) == MAX_CHUNK_TOKENS
    assert choose_chunk_tokens(8192, 131072, 4096, torch.float32) == 832
    assert choose_chunk_tokens(1000, 1000, 4096, torch.float32) == MIN_CHUNK_TOKENS
    assert choose_chunk_tokens(5, 131072, 4096, torch.float32) == 5
    assert choose_chunk_tokens(0, 131072, 4096, torch.float32) == 1


# Logits that wait ----------------------------------------------------------------------------------------------------


class Exp(torch.autograd.Function):
    """A custom Function: it reads its input past the hooks of Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.exp()


def in_place(x: Tensor) -> Tensor:
    y = x * 1.5
    z = y / 2.0
    y.div_(3.0)
    return y + z


def in_a_view(x: Tensor) -> Tensor:
    y = x.float()
    y[..., :3].mul_(2.0)
    return y


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x + 0,
    "softcap": lambda x: torch.tanh(x / 3.0) * 3.0,
    "cast": lambda x: x.float(),
    "slice": lambda x: x[:, :-1, :].contiguous(),
    "rows": lambda x: x.view(-1, 11),
    "log-softmax": lambda x: F.log_softmax(x.float(), -1),
    "cross-entropy": lambda x: F.cross_entropy(x.view(-1, 11).float(), torch.arange(10)),
    "custom Function": Exp.apply,
    "in place": in_place,
    "in a view": in_a_view,
    "gather": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    "detach": lambda x: x * x.detach(),
    "list": lambda x: torch.stack(list(x)),
    "tanh in place": lambda x: (x / 2.0).tanh_(),
    "vmap": lambda x: torch.func.vmap(lambda row: row * 2)(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("read", list(READERS.values()), ids=list(READERS))
def test_logits_that_are_read_are_exact(read, dtype):
    """Value and gradients, to the last bit."""
    found = []
    tensors = [torch.randn(shape).to(dtype) for shape in ((2, 5, 8), (11, 8), (11,))]
    for linear in (F.linear, defer):
        leaves = [t.clone().requires_grad_() for t in tensors]
        value = read(linear(leaves[0] * 1, *leaves[1:]))
        gradients = torch.autograd.grad(value.float().square().sum(), leaves)
        found.append([value.detach() + 0, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_logits_that_nobody_reads_have_a_shape_and_no_memory():
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8)
    logits = defer(hidden, weight, None)
    assert isinstance(logits, Tensor)
    assert (logits.shape, logits.dtype, logits.device) == ((2, 5, 11), torch.float32, hidden.device)
    assert logits.requires_grad
    assert not logits.is_leaf
    assert "computed when they are read" in repr(logits)
    for waiting in (logits.detach(), logits.float(), logits * 0.5, torch.tanh(logits / 30.0), logits.view_as(logits)):
        assert isinstance(waiting, DeferredLogits)
    assert logits.source.value is None


def test_logits_are_read_past_operators_too():
    hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
    expected = F.linear(hidden, weight)

    def new() -> Tensor:
        return defer(hidden, weight, None)

    assert (new().numpy() == expected.numpy()).all()
    assert new().tolist() == expected.tolist()
    assert new()[0, 0, 0].item() == expected[0, 0, 0].item()
    assert torch.equal(pickle.loads(pickle.dumps(new())), expected)
    assert torch.equal(copy.deepcopy(new()), expected)
    stored = io.BytesIO()
    torch.save(new(), stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored), expected)
    with pytest.raises(RuntimeError, match="requires grad"):
        defer(hidden.clone().requires_grad_(), weight, None).numpy()


def test_logits_of_other_weights_are_not_given():
    """After `optimizer.step()` they would be those of the next step."""
    weight = torch.randn(11, 8)
    logits = defer(torch.randn(2, 5, 8), weight, None)
    weight.add_(1)
    with pytest.raises(ChangedTensorError, match=r"before `optimizer.step\(\)`"):
        logits + 1
    read = defer(torch.randn(2, 5, 8), weight, None)
    before = read.sum()
    weight.add_(1)
    assert torch.equal(read.sum(), before)


# Language models -----------------------------------------------------------------------------------------------------


def config_of(name: str) -> Any:
    """A tiny configuration of an architecture."""
    import transformers

    shape = decoder_shape(num_hidden_layers=2, max_position_embeddings=256)
    small = {"num_key_value_heads": 2, "head_dim": 8}
    more: dict[str, dict[str, Any]] = {
        "Gemma2": {**small, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
        "Gemma3Text": {**small, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
        "Cohere": {"logit_scale": 0.3},
        "Cohere2": {"logit_scale": 0.3},
        "Granite": {"logits_scaling": 3.0},
        "Llama": {"tie_word_embeddings": True},
        "Qwen3": small,
        "Mistral": {"num_key_value_heads": 2},
    }
    if name == "GPT2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        return transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, **dropout, **ids
        )
    return getattr(transformers, f"{name}Config")(**shape, **more.get(name, {}))


def model_of(name: str) -> Any:
    """A tiny model, with the same weights at every call."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name))
    model.config.use_cache = False
    return model.train()


def padded_batch(i: int, *, length: int = 160) -> dict[str, Tensor]:
    """More tokens than two chunks take; the second row is padded, and its prompt has no labels."""
    ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(i))
    mask = torch.ones_like(ids)
    mask[1, -17 - i :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : 10 * i] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: nn.Module, i: int, read: Callable[[Any], Tensor] = lambda output: output.loss, **more: Any) -> Grads:
    """Loss and gradients of one step; the model is left without any."""
    torch.manual_seed(i)
    loss = read(model(**padded_batch(i), **more))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def assert_close(found: Grads, expected: Grads) -> None:
    """But for the order of sums, whose differences go through the whole backward."""
    assert found.keys() == expected.keys()
    largest = max(float(t.abs().max()) for name, t in expected.items() if name != "loss")
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 0.01 * largest)
        assert (found[name] - tensor).abs().max() <= 32 * torch.finfo(torch.float32).eps * scale, name


def notes(handle: memfit.Handle) -> str:
    return " | ".join(handle.summary()["notes"])


MODELS = ["Llama", "GPT2", "Gemma2", "Gemma3Text", "Qwen3", "Cohere", "Cohere2", "Granite", "Mistral", "Phi"]


@pytest.mark.parametrize("options", [{}, {"budget": "min"}], ids=["measured", "min"])
@pytest.mark.parametrize("name", MODELS)
def test_language_models_train_as_without(name, options):
    """Loss and every gradient, with a prompt and padding; the logits are never there."""
    steps: list[dict[str, Any]] = [{}, {"num_items_in_batch": torch.tensor(77)}, {"num_items_in_batch": 77}]
    model = model_of(name)
    expected = [train(model, i, **more) for i, more in enumerate(steps)]
    before = {key: dict(module.__dict__) for key, module in model.named_modules()}
    handle = memfit.fit(model, chunked_loss=True, **options)
    for i, more in enumerate(steps):
        assert_close(train(model, i, **more), expected[i])
    assert "the loss is computed in chunks of 128 tokens" in notes(handle)
    assert "stepped aside" not in notes(handle)
    assert "were read" not in notes(handle)
    assert "chunks of 128 tokens" in handle.report()
    handle.remove()
    for key, module in model.named_modules():
        assert module.__dict__.keys() == before[key].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    again = train(model, 0)
    assert all(torch.equal(again[key], tensor) for key, tensor in expected[0].items())


@pytest.mark.parametrize("name", ["Gemma2", "Cohere", "Granite"])
def test_logits_of_a_fitted_model_can_be_read(name):
    """Values to the last bit, and gradients of what is made of them."""

    def read(output: Any) -> Tensor:
        return output.loss + 1e-2 * output.logits[:, :-1].float().square().mean()

    model = model_of(name)
    expected, logits = train(model, 1, read), model(**padded_batch(2)).logits.detach()
    with memfit.fit(model, chunked_loss=True) as handle:
        assert_close(train(model, 1, read), expected)
        output = model(**padded_batch(2))
        assert isinstance(output.logits, DeferredLogits)
        assert output.logits.source.value is None
        assert output.logits.shape == logits.shape
        assert torch.equal(output.logits.detach(), logits)
        output.loss.backward()
        assert torch.equal(output.logits.argmax(-1), logits.argmax(-1))
        assert "`.logits` were read after the loss" in notes(handle)


def test_shifted_labels_and_kept_logits():
    """What `loss_function` takes beside labels."""
    model, batch = model_of("Llama"), padded_batch(1)
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[..., 1:].contiguous()
    expected = train(model, 1, shift_labels=shifted)
    with memfit.fit(model, chunked_loss=True) as handle:
        assert_close(train(model, 1, shift_labels=shifted), expected)
        kept = model(**{**batch, "labels": batch["labels"][:, -20:]}, logits_to_keep=20)
        assert kept.logits.shape == (2, 20, VOCAB)
        assert model(**batch, return_dict=False)[1].shape == (2, 160, VOCAB)
        assert "stepped aside" not in notes(handle)
    torch.testing.assert_close(
        kept.loss, model(**{**batch, "labels": batch["labels"][:, -20:]}, logits_to_keep=20).loss
    )


def test_a_wrong_vocabulary_is_refused_as_without():
    """Logits are read as rows of so many classes: the plain loss then finds too few labels."""
    model = model_of("Llama")
    model.config.vocab_size = 2 * VOCAB
    messages = []
    for fits in (False, True):
        handle = memfit.fit(model, chunked_loss=True) if fits else None
        with pytest.raises(ValueError, match="batch_size") as error:
            train(model, 0)
        messages.append(str(error.value))
        if handle is not None:
            handle.remove()
    assert messages[0] == messages[1]


def test_nothing_else_changes():
    """Evaluation, generation, forwards without labels, and without gradients, run as they are."""
    model, batch = model_of("Llama"), padded_batch(1)
    model.eval()
    loss, logits = model(**batch).loss, model(input_ids=batch["input_ids"]).logits
    words = model.generate(batch["input_ids"][:1, :5], max_new_tokens=4, do_sample=False)
    with memfit.fit(model, chunked_loss=True):
        assert torch.equal(model(**batch).loss, loss)
        assert torch.equal(model.generate(batch["input_ids"][:1, :5], max_new_tokens=4, do_sample=False), words)
        model.train()
        assert type(model(input_ids=batch["input_ids"]).logits) is Tensor
        assert torch.equal(model(input_ids=batch["input_ids"]).logits, logits)
        with torch.no_grad():
            assert torch.equal(model(**batch).loss, loss)
        twin = copy.deepcopy(model)
        assert type(twin(**batch).logits) is Tensor
        assert type(pickle.loads(pickle.dumps(model))(**batch).logits) is Tensor


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_forward_leaves_nothing(error):
    model = model_of("Llama")
    expected = train(model, 0)
    armed = [False]

    def strike(module: nn.Module, args: Any) -> None:
        if armed[0]:
            raise error("stop")

    model.model.norm.register_forward_pre_hook(strike)
    handle = memfit.fit(model, chunked_loss=True)
    train(model, 1)
    armed[0] = True
    with pytest.raises(error):
        model(**padded_batch(0))
    armed[0] = False
    assert_close(train(model, 0), expected)
    armed[0] = True
    with pytest.raises(error):
        model(**padded_batch(0))
    handle.remove()
    assert "forward" not in model.lm_head.__dict__
    assert "_loss_function" not in model.__dict__


def test_frozen_and_adapted_models():
    """LoRA in the blocks: the head is frozen, and its gradient is not computed."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model_of("Llama"), config)
    expected = [train(model, i) for i in range(2)]
    with memfit.fit(model, chunked_loss=True, budget="min") as handle:
        for i in range(2):
            assert_close(train(model, i), expected[i])
        assert "in chunks of 128 tokens" in notes(handle)


@pytest.mark.parametrize("unused", [False, True])
def test_data_parallel(unused, alone):
    """DDP finds the head's gradient in the graph of the loss, whether it looks at the outputs or not."""
    model = model_of("Llama")
    expected = [train(model, i) for i in range(3)]
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    with memfit.fit(parallel, chunked_loss=True) as handle:
        for i in range(3):
            found = train(parallel, i)
            assert_close({name.removeprefix("module."): tensor for name, tensor in found.items()}, expected[i])
        assert "in chunks of 128 tokens" in notes(handle)
        assert "were read" not in notes(handle)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# Stepping aside ------------------------------------------------------------------------------------------------------


def with_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)


def with_forward(model: Any) -> None:
    head = model.lm_head
    head.forward = lambda hidden: nn.Linear.forward(head, hidden) * 2


class OtherLinear(nn.Linear):
    """As a quantized head is one."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * 2


def with_other_head(model: Any) -> None:
    model.lm_head.__class__ = OtherLinear


def with_adapter(model: Any) -> None:
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False), model)


def with_parametrization(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.lm_head)


def with_loss_function(model: Any) -> None:
    def twice(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return 2 * F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1).clamp(min=0))

    model.loss_function = twice


def with_fused_forward(model: Any) -> None:
    """As Liger's: the loss is computed from the head's weight."""

    def forward(self: Any, labels: Tensor, **inputs: Any) -> Any:
        hidden = self.model(**inputs).last_hidden_state
        return types.SimpleNamespace(loss=linear_cross_entropy(hidden, self.lm_head.weight, labels.clamp(min=0)))

    model.forward = types.MethodType(forward, model)


def with_own_loss(model: Any) -> None:
    """The loss is computed by the forward itself, as T5's is."""
    original = model.forward

    def forward(labels: Tensor, **inputs: Any) -> Any:
        logits = original(**inputs).logits
        return types.SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))

    model.forward = forward


def with_biased_logits(model: Any) -> None:
    """Something else than scaling happens between head and loss."""
    function = type(model).loss_function.fget(model)
    original = model.forward

    def forward(labels: Tensor, **inputs: Any) -> Any:
        output = original(**inputs)
        logits = output.logits + torch.linspace(0, 1, VOCAB)
        return types.SimpleNamespace(loss=model.loss_function(logits, labels, VOCAB))

    assert callable(function)
    model.forward = forward


def with_compilation(model: Any) -> None:
    model.compile(backend="eager")


def with_other_logits(model: Any) -> None:
    model.config.vocab_size = VOCAB  # what the loss is told stays as it is
    model.lm_head = nn.Linear(32, 2 * VOCAB, bias=False)
    original = model.forward

    def forward(labels: Tensor, **inputs: Any) -> Any:
        logits = original(**inputs).logits
        labels = torch.cat([labels, labels], 1)
        return types.SimpleNamespace(loss=model.loss_function(logits, labels, VOCAB))

    model.forward = forward


ASIDE: dict[str, tuple[Callable[[Any], None], str]] = {
    "hook": (with_hook, "the head has hooks"),
    "forward": (with_forward, "the head's forward is patched"),
    "quantized": (with_other_head, "the head is a OtherLinear"),
    "adapter": (with_adapter, "the head is a Linear, not a plain `torch.nn.Linear`"),
    "parametrization": (with_parametrization, "the head is a ParametrizedLinear"),
    "loss function": (with_loss_function, "a `loss_function` of its own"),
    "fused": (with_fused_forward, "without calling its head"),
    "own loss": (with_own_loss, "computes its loss itself"),
    "biased": (with_biased_logits, "something else of its logits"),
    "compiled": (with_compilation, "the model is compiled"),
    "shapes": (with_other_logits, "of other shapes"),
}


@pytest.mark.parametrize(("change", "words"), list(ASIDE.values()), ids=list(ASIDE))
def test_stepping_aside(change, words):
    """The model's own loss to the last bit, and the reason in the report."""
    model = model_of("Mistral")
    change(model)
    expected = [train(model, i) for i in range(2)]
    with memfit.fit(model, chunked_loss=True) as handle:
        for i in range(2):
            found = train(model, i)
            assert all(torch.equal(found[key], tensor) for key, tensor in expected[i].items())
        assert "`chunked_loss` stepped aside: " in notes(handle)
        assert words in notes(handle)
        assert "the loss is computed in chunks" not in notes(handle)


def test_without_labels():
    """As with the Trainer's label smoothing: the loss is made of logits, and the report says that it is no other."""
    model, batch = model_of("Llama"), padded_batch(0)
    labels = batch.pop("labels")
    with memfit.fit(model, chunked_loss=True) as handle:
        F.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten()).backward()
        assert "the model is given no `labels`" in notes(handle)


def test_sharded_heads_step_aside(alone):
    from torch.distributed.fsdp import fully_shard

    model = model_of("Llama")
    expected = train(model, 0)["loss"]
    fully_shard(model)
    with memfit.fit(model, chunked_loss=True) as handle:
        output = model(**padded_batch(0))
        output.loss.backward()
        assert torch.equal(output.loss.detach(), expected)
        assert "`chunked_loss` stepped aside: the head's weight is sharded" in notes(handle)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert", "ForMaskedLMLoss"),
        ("t5", "computes its loss itself"),
        ("vit", "this is no language model"),
        ("nanogpt", "this is no language model"),
    ],
)
def test_other_models_step_aside(name, words):
    case: Case = build(name)
    with memfit.fit(case.model, chunked_loss=True) as handle:
        batch = case.batches(0)
        output = case.model(*batch["args"]) if "args" in batch else case.model(**batch)
        case.loss(output, batch).backward()
        assert words in notes(handle)


# `auto`, the Trainer, the command line -------------------------------------------------------------------------------


def step_profile(outside: list[int]) -> StepProfile:
    """A forward, a loss and a backward of one call; ``outside``: bytes at each."""
    program = ProgramProfile(
        key="p",
        nodes=(),
        ops=(),
        saved=(),
        outputs=(),
        timeline=(),
        forward_seconds=1.0,
        backward_seconds=2.0,
        forward_bytes=0,
    )
    kinds = (("forward of b", "forward"), ("loss", "outside"), ("backward of b", "backward"))
    events = tuple(
        StepEvent(name=name, kind=kind, call=0 if kind != "outside" else None, live_calls=(), outside_bytes=size)
        for (name, kind), size in zip(kinds, outside, strict=True)
    )
    calls = (BlockCall(name="b", program="p"),)
    return StepProfile(device="cpu", programs={"p": program}, calls=calls, events=events, outside_seconds=0.0)


def test_auto_expects_the_forward_and_the_heads_gradient():
    profile = with_chunked_loss(step_profile([100, 1100, 50]), gradient_bytes=200)
    assert profile is not None
    assert [event.outside_bytes for event in profile.events] == [100, 350, 50]
    assert with_chunked_loss(step_profile([100, 300, 50]), gradient_bytes=200) is None


def test_auto_pays():
    model = types.SimpleNamespace
    fast, slow = (model(recompute_seconds=s, predicted_peak_bytes=b) for s, b in ((0.1, 900), (1.0, 1000)))
    profile = step_profile([1, 2, 3])
    assert pays(fast, slow, profile, smallest=False)
    assert pays(fast, None, profile, smallest=False)
    assert not pays(None, None, profile, smallest=False)
    assert not pays(slow, slow, profile, smallest=False)
    assert pays(fast, slow, profile, smallest=True)
    assert not pays(slow, slow, profile, smallest=True)


def wide_model() -> Any:
    """Whose logits are most of its activations."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16000, **shape, use_cache=False)).train()


@pytest.mark.parametrize(("budget", "chunks"), [("min", True), ("1TiB", False)])
def test_auto_switches_it_on_where_it_pays(budget, chunks):
    """The logits own the smallest peak of this model; with room for everything nothing is gained."""
    model = wide_model()
    with memfit.fit(model, budget=budget, chunked_loss="auto", optimizer="sgd") as handle:
        for i in range(4):
            ids = torch.randint(16000, (2, 512), generator=torch.Generator().manual_seed(i))
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()
        assert ("the loss is computed in chunks" in notes(handle)) == chunks
        assert handle.plan is not None
        assert "stepped aside" not in notes(handle)


@pytest.mark.parametrize("choice", ["on", 1, None])
def test_other_choices_are_refused(choice):
    with pytest.raises(UsageError, match="`chunked_loss="):
        memfit.fit(model_of("Llama"), chunked_loss=choice)


def test_plan_takes_it():
    """A plan that is made with it knows of the smaller loss."""
    peaks = []
    for chunked in (False, True):
        ids = torch.randint(16000, (2, 512))
        plan = memfit.plan(wide_model(), {"input_ids": ids, "labels": ids}, chunked_loss=chunked, optimizer="sgd")
        peaks.append(plan.predicted_peak_bytes)
    assert peaks[1] < peaks[0]
    with pytest.raises(UsageError, match="`chunked_loss=auto`"):
        memfit.plan(wide_model(), {}, chunked_loss="auto")


def test_the_trainer(tmp_path):
    """With accumulation, where it says how many items the batch has."""
    from transformers import Trainer, TrainingArguments

    from memfit.integrations.transformers import MemfitCallback

    data = [{key: value[row] for key, value in padded_batch(i).items()} for i in range(4) for row in range(2)]
    found = []
    for callbacks in ([], [MemfitCallback(chunked_loss=True)]):
        model = model_of("Qwen3")
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-3, optim="sgd",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert "the loss is computed in chunks of 128 tokens" in callbacks[0].report()
    assert "were read" not in callbacks[0].report()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-7)


SCRIPT = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, **shape)).train()
for _ in range(3):
    ids = torch.randint(97, (2, 160))
    model(input_ids=ids, labels=ids).loss.backward()
"""


def test_memfit_run(shell):
    shell.write("train.py", SCRIPT)
    done = shell.run("--chunked-loss", "--report", "report.json", "--", "train.py")
    assert done.returncode == 0, done.stderr
    report = json.loads((shell.folder / "report.json").read_text())
    assert any("in chunks of 128 tokens" in note for note in report["notes"])
    assert "in chunks of 128 tokens" in done.stderr
    refused = shell.run("--chunked-loss", "perhaps", "--", "train.py")
    assert refused.returncode == 2
