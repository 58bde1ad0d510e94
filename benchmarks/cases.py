"""The models that are measured: random weights, real architectures, real shapes.

A case builds a model, its batches and its optimizer. The *step* cases are the three shapes of the benchmark, on CPU
small enough for two cores, on CUDA large enough that kernels and not launches set the time. They use SGD: Adam's step
would add to the denominator of every ratio and make each overhead look smaller. The *held* cases are the ones on which
a budget has to be held; half of them use AdamW, whose state is born after the first backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A model with what it trains on.

    Attributes:
        model: In training mode, on its device.
        make_batch: A new random batch from the given generator, on CPU.
        optimizer: Over all parameters.
        loss: From the model's output.
    """

    model: nn.Module
    make_batch: Callable[[torch.Generator], Batch]
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any], Tensor]


Make = Callable[[], nn.Module]
Build = Callable[[str], Built]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model and shape.

    Attributes:
        title: What a table calls it.
        build: Makes it on a device.
    """

    title: str
    build: Build


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-4)
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def _language_model(
    make: Make, *, vocab: int, batch: int, tokens: int, optimizer: str, shortest: int | None = None
) -> Build:
    """A builder for models that take `input_ids` and `labels`.

    With ``shortest`` every batch has a length of its own, from there to ``tokens``; the mean lies at a third.
    """

    def build(device: str) -> Built:
        torch.manual_seed(0)
        model = make().to(device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16).train()

        def make_batch(generator: torch.Generator) -> Batch:
            length = tokens
            if shortest is not None:
                length = shortest + int((tokens - shortest) * float(torch.rand((), generator=generator)) ** 2)
            ids = torch.randint(10, vocab, (batch, length), generator=generator)
            return {"input_ids": ids, "labels": ids}

        return Built(
            model=model, make_batch=make_batch, optimizer=_optimizer(optimizer, model), loss=lambda output: output.loss
        )

    return build


def _classifier(make: Make, batches: Callable[[torch.Generator], Batch], *, optimizer: str) -> Build:
    """A builder for models that take what ``batches`` makes and return an output with a loss."""

    def build(device: str) -> Built:
        torch.manual_seed(0)
        model = make().to(device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16).train()
        return Built(
            model=model, make_batch=batches, optimizer=_optimizer(optimizer, model), loss=lambda output: output.loss
        )

    return build


def llama(
    *,
    layers: int,
    hidden: int,
    heads: int,
    batch: int,
    tokens: int,
    vocab: int = 8192,
    optimizer: str = "sgd",
    shortest: int | None = None,
) -> Build:
    """Llama-like: RMS norms, rotary embeddings, a gated MLP of 8/3 of the hidden size."""

    def make() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=-(-hidden * 8 // 3 // 64) * 64,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=tokens,
            use_cache=False,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model

    return _language_model(make, vocab=vocab, batch=batch, tokens=tokens, optimizer=optimizer, shortest=shortest)


def bert(*, layers: int, hidden: int, heads: int, batch: int, tokens: int, optimizer: str = "sgd") -> Build:
    """BERT-like with dropout 0.1, ragged padding and a classifier, as a sentence encoder is trained."""
    vocab = 8192

    def make() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokens,
        )
        model: nn.Module = BertForSequenceClassification(config)
        return model

    def make_batch(generator: torch.Generator) -> Batch:
        ids = torch.randint(10, vocab, (batch, tokens), generator=generator)
        lengths = torch.randint(tokens // 2, tokens + 1, (batch, 1), generator=generator)
        lengths[0] = tokens
        mask = (torch.arange(tokens)[None, :] < lengths).long()
        labels = torch.randint(0, 2, (batch,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return _classifier(make, make_batch, optimizer=optimizer)


def gpt2(*, layers: int, hidden: int, heads: int, batch: int, tokens: int, optimizer: str) -> Build:
    """GPT-2-like: fused projections, dropout 0.1."""
    vocab = 8192

    def make() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=vocab, n_positions=tokens, n_embd=hidden, n_layer=layers, n_head=heads, use_cache=False
        )
        config.loss_type = "ForCausalLM"
        model: nn.Module = GPT2LMHeadModel(config)
        return model

    return _language_model(make, vocab=vocab, batch=batch, tokens=tokens, optimizer=optimizer)


def qwen3(*, layers: int, hidden: int, heads: int, batch: int, tokens: int, optimizer: str) -> Build:
    """Qwen3-like: grouped queries, norms on queries and keys, tied embeddings."""
    vocab = 16384

    def make() -> nn.Module:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=hidden // heads,
            max_position_embeddings=tokens,
            tie_word_embeddings=True,
            use_cache=False,
        )
        model: nn.Module = Qwen3ForCausalLM(config)
        return model

    return _language_model(make, vocab=vocab, batch=batch, tokens=tokens, optimizer=optimizer)


def t5(*, layers: int, hidden: int, heads: int, batch: int, tokens: int, optimizer: str) -> Build:
    """T5-like: an encoder and a decoder whose blocks all read the encoder's output."""
    vocab = 8192

    def make() -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=vocab,
            d_model=hidden,
            d_kv=hidden // heads,
            d_ff=4 * hidden,
            num_layers=layers,
            num_heads=heads,
            decoder_start_token_id=0,
            use_cache=False,
        )
        model: nn.Module = T5ForConditionalGeneration(config)
        return model

    return _language_model(make, vocab=vocab, batch=batch, tokens=tokens, optimizer=optimizer)


def vit(*, layers: int, hidden: int, heads: int, batch: int, image: int, optimizer: str) -> Build:
    """ViT-like: patches of 16 pixels."""

    def make() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            image_size=image,
            num_labels=10,
        )
        model: nn.Module = ViTForImageClassification(config)
        return model

    def make_batch(generator: torch.Generator) -> Batch:
        pixels = torch.randn(batch, 3, image, image, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, 10, (batch,), generator=generator)}

    return _classifier(make, make_batch, optimizer=optimizer)


class _Encoder(nn.Module):
    """Plain PyTorch: `nn.TransformerEncoder` over random features."""

    def __init__(self, *, layers: int, hidden: int, heads: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.encoder(x).mean(1)), labels)


def encoder(*, layers: int, hidden: int, heads: int, batch: int, tokens: int, optimizer: str) -> Build:
    """`nn.TransformerEncoder`, whose forward returns the loss itself."""

    def build(device: str) -> Built:
        torch.manual_seed(0)
        model = _Encoder(layers=layers, hidden=hidden, heads=heads).to(device).train()

        def make_batch(generator: torch.Generator) -> Batch:
            x = torch.randn(batch, tokens, hidden, generator=generator)
            return {"x": x, "labels": torch.randint(0, 10, (batch,), generator=generator)}

        return Built(
            model=model, make_batch=make_batch, optimizer=_optimizer(optimizer, model), loss=lambda output: output
        )

    return build


STEP_CASES: dict[str, dict[str, Case]] = {
    "cpu": {
        "llama": Case(
            title="Llama-like, 12 layers, hidden 768, 2 × 512 tokens",
            build=llama(layers=12, hidden=768, heads=12, batch=2, tokens=512),
        ),
        "heavy": Case(
            title="activation-heavy Llama-like, 24 layers, hidden 256, 2 × 1024 tokens",
            build=llama(layers=24, hidden=256, heads=4, batch=2, tokens=1024),
        ),
        "bert": Case(
            title="BERT-like, 12 layers, hidden 384, 16 × 256 tokens, dropout 0.1",
            build=bert(layers=12, hidden=384, heads=12, batch=16, tokens=256),
        ),
    },
    "cuda": {
        "llama": Case(
            title="Llama-like, bf16, 16 layers, hidden 2048, 4 × 4096 tokens",
            build=llama(layers=16, hidden=2048, heads=16, batch=4, tokens=4096, vocab=32768),
        ),
        "heavy": Case(
            title="activation-heavy Llama-like, bf16, 32 layers, hidden 1024, 16 × 4096 tokens",
            build=llama(layers=32, hidden=1024, heads=16, batch=16, tokens=4096),
        ),
        "bert": Case(
            title="BERT-like, bf16, 24 layers, hidden 1024, 128 × 512 tokens, dropout 0.1",
            build=bert(layers=24, hidden=1024, heads=16, batch=128, tokens=512),
        ),
    },
}

# Plain peaks from 1 to 2.5 GiB with little arithmetic: what counts here is bytes.
HELD_CASES: dict[str, Case] = {
    "llama-sgd": Case(title="Llama-like, SGD", build=llama(layers=16, hidden=256, heads=4, batch=4, tokens=512)),
    "llama-adamw": Case(
        title="Llama-like, AdamW",
        build=llama(layers=10, hidden=512, heads=8, batch=4, tokens=256, optimizer="adamw"),
    ),
    "gpt2-adamw": Case(
        title="GPT-2-like with dropout, AdamW",
        build=gpt2(layers=8, hidden=256, heads=8, batch=4, tokens=512, optimizer="adamw"),
    ),
    "qwen3-adamw": Case(
        title="Qwen3-like, AdamW",
        build=qwen3(layers=12, hidden=384, heads=6, batch=2, tokens=512, optimizer="adamw"),
    ),
    "bert-sgd": Case(
        title="BERT-like with dropout, SGD", build=bert(layers=8, hidden=256, heads=8, batch=16, tokens=256)
    ),
    "t5-adamw": Case(
        title="T5-like with dropout, AdamW",
        build=t5(layers=6, hidden=256, heads=8, batch=8, tokens=192, optimizer="adamw"),
    ),
    "vit-sgd": Case(
        title="ViT-like, SGD", build=vit(layers=12, hidden=192, heads=3, batch=24, image=224, optimizer="sgd")
    ),
    "encoder-adamw": Case(
        title="nn.TransformerEncoder with dropout, AdamW",
        build=encoder(layers=8, hidden=256, heads=8, batch=16, tokens=192, optimizer="adamw"),
    ),
}


LENGTH_CASES: dict[str, dict[str, Case]] = {
    "cpu": {
        "lengths": Case(
            title="Llama-like, 12 layers, hidden 384, 4 × 64 to 512 tokens, every batch of another length",
            build=llama(layers=12, hidden=384, heads=6, batch=4, tokens=512, shortest=64),
        )
    },
    "cuda": {
        "lengths": Case(
            title="Llama-like, bf16, 16 layers, hidden 2048, 4 × 512 to 4096 tokens, every batch of another length",
            build=llama(layers=16, hidden=2048, heads=16, batch=4, tokens=4096, shortest=512, vocab=32768),
        )
    },
}


def find(name: str, device: str) -> Case:
    """A case by name: step and length cases by the device's kind, held cases anywhere.

    Raises:
        KeyError: No such case.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    cases = {**STEP_CASES[kind], **LENGTH_CASES[kind]}
    return cases[name] if name in cases else HELD_CASES[name]


def batches(built: Built, device: str, *, seed: int = 1) -> Iterator[Batch]:
    """An endless sequence of new batches, the same for every configuration."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch = built.make_batch(generator)
        if device.startswith("cuda"):
            floats = torch.bfloat16
            batch = {k: v.to(device, floats) if v.is_floating_point() else v.to(device) for k, v in batch.items()}
        yield batch
