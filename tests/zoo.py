"""Tiny models of every architecture that Memfit promises, with fresh data for every step.

Two or three blocks of 32 to 64 channels each: a step takes tens of milliseconds, and everything that makes an
architecture different is still there. Dropout is on wherever the architecture has it: a replay that draws other random
numbers than the forward pass must not pass unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 97
BATCH = 2
LENGTH = 12

Batch = dict[str, Any]
Loss = Callable[[Any, Batch], Tensor]


def output_loss(output: Any, batch: Batch) -> Tensor:
    """The loss that a Hugging Face model returns."""
    return output.loss


class Case(NamedTuple):
    """A model in training mode, and what it is trained on.

    ``batches(i)`` is the batch of step ``i``, always the same for the same ``i``; the model is called with
    ``batch["args"]`` if there are any, else with the whole batch as keywords.
    """

    model: nn.Module
    batches: Callable[[int], Batch]
    loss: Loss = output_loss


BUILDERS: dict[str, Callable[[], Case]] = {}
HUGGING_FACE: list[str] = []
PLAIN_PYTORCH: list[str] = []
VARIED: list[str] = []


def build(name: str) -> Case:
    """Build a model with the same weights at every call; leaves the random state at a fixed point."""
    torch.manual_seed(0)
    case = BUILDERS[name]()
    without_cache(case.model).train()
    torch.manual_seed(1)
    return case


def without_cache(model: nn.Module) -> nn.Module:
    """Switch the key-value cache off, as a fitted model does while it trains.

    It is no part of training, and its concatenations change strides, and so bits: GPT-2, OPT and T5 train to other last
    digits with it than without.
    """
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    return model


def call(model: nn.Module, batch: Batch) -> Any:
    """Call a model with a batch."""
    return model(*batch["args"]) if "args" in batch else model(**batch)


def hugging_face(function: Callable[[], Case]) -> Callable[[], Case]:
    """Register a builder under its name, with dashes for underscores."""
    name = function.__name__.replace("_", "-")
    HUGGING_FACE.append(name)
    BUILDERS[name] = function
    return function


def plain_pytorch(function: Callable[[], Case]) -> Callable[[], Case]:
    """Register a builder of a model that knows nothing of Hugging Face."""
    name = function.__name__.replace("_", "-")
    PLAIN_PYTORCH.append(name)
    BUILDERS[name] = function
    return function


def varied(function: Callable[[], Case]) -> Callable[[], Case]:
    """Register a builder of an architecture that is there already, in another setting."""
    name = function.__name__.replace("_", "-")
    VARIED.append(name)
    BUILDERS[name] = function
    return function


# Batches -------------------------------------------------------------------------------------------------------------


def generator(i: int) -> torch.Generator:
    """A generator of its own for step ``i``: making data must not touch the random state that the model reads."""
    return torch.Generator().manual_seed(1000 + i)


def tokens(i: int, *, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=generator(i))


def language(i: int, *, batch: int = BATCH, length: int = LENGTH) -> Batch:
    """Next-token prediction."""
    ids = tokens(i, batch=batch, length=length)
    return {"input_ids": ids, "labels": ids.clone()}


def masked_language(i: int, *, batch: int = BATCH, length: int = LENGTH) -> Batch:
    """Predict a third of the tokens."""
    ids = tokens(i, batch=batch, length=length)
    masked = torch.rand(ids.shape, generator=generator(i + 500)) < 0.33
    masked[:, 1] = True
    return {"input_ids": ids.masked_fill(masked, 2), "labels": ids.masked_fill(~masked, -100)}


def padded(batch: Batch, i: int, *, side: str = "right") -> Batch:
    """Add a padding mask that is another one at every step, and none that pads at every third."""
    ids = batch["input_ids"]
    rows, length = ids.shape
    mask = torch.ones_like(ids)
    if i % 3 != 1:
        for row in range(rows):
            pad = (2 * i + 3 * row) % (length // 2) + (row == 0)
            if pad and side == "right":
                mask[row, length - pad :] = 0
            elif pad:
                mask[row, :pad] = 0
    labels = batch["labels"].masked_fill(mask == 0, -100)
    return {**batch, "input_ids": ids.masked_fill(mask == 0, 0), "labels": labels, "attention_mask": mask}


def translation(i: int) -> Batch:
    """Source tokens and the labels of the decoder."""
    return {"input_ids": tokens(i), "labels": tokens(i + 500, length=LENGTH - 3)}


def images(i: int, *, size: int, classes: int = 5, batch: int = BATCH) -> Batch:
    """Images and their classes."""
    return {
        "pixel_values": torch.randn(batch, 3, size, size, generator=generator(i)),
        "labels": torch.randint(classes, (batch,), generator=generator(i + 500)),
    }


# Hugging Face, decoders ----------------------------------------------------------------------------------------------


def decoder_shape(**more: Any) -> dict[str, Any]:
    """What most decoder configurations call the same."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }


def gpt2_model(**more: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more))


@hugging_face
def gpt2() -> Case:
    return Case(gpt2_model(), language)


def llama_model(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**decoder_shape(num_key_value_heads=2, attention_dropout=0.1, **more)))


@hugging_face
def llama() -> Case:
    return Case(llama_model(), language)


@hugging_face
def qwen3() -> Case:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**decoder_shape(num_key_value_heads=2, head_dim=8, attention_dropout=0.1))
    return Case(Qwen3ForCausalLM(config), language)


@hugging_face
def gemma() -> Case:
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(**decoder_shape(num_key_value_heads=1, head_dim=8, attention_dropout=0.1))
    return Case(GemmaForCausalLM(config), language)


@hugging_face
def phi() -> Case:
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(**decoder_shape(resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1))
    return Case(PhiForCausalLM(config), language)


@hugging_face
def falcon() -> Case:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(**decoder_shape(hidden_dropout=0.1, attention_dropout=0.1, ffn_hidden_size=48))
    return Case(FalconForCausalLM(config), language)


@hugging_face
def opt() -> Case:
    from transformers import OPTConfig, OPTForCausalLM

    shape = decoder_shape(ffn_dim=48, word_embed_proj_dim=32, dropout=0.1, attention_dropout=0.1)
    return Case(OPTForCausalLM(OPTConfig(**shape)), language)


@hugging_face
def bloom() -> Case:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, hidden_dropout=0.1, attention_dropout=0.1, pad_token_id=0
    )
    return Case(BloomForCausalLM(config), language)


@hugging_face
def gpt_neox() -> Case:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(**decoder_shape(hidden_dropout=0.1, attention_dropout=0.1))
    return Case(GPTNeoXForCausalLM(config), language)


def mixtral_model(**more: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = decoder_shape(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, attention_dropout=0.1)
    return MixtralForCausalLM(MixtralConfig(**shape, output_router_logits=True, router_jitter_noise=0.01, **more))


@hugging_face
def mixtral() -> Case:
    return Case(mixtral_model(), language)


def qwen_moe_model(**more: Any) -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    shape = decoder_shape(num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1)
    widths = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**shape, **widths, attention_dropout=0.1, **more))


@hugging_face
def qwen_moe() -> Case:
    return Case(qwen_moe_model(), language)


@hugging_face
def mamba() -> Case:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=3, expand=2, conv_kernel=4, time_step_rank=4
    )
    return Case(MambaForCausalLM(config), language)


# Hugging Face, encoders ----------------------------------------------------------------------------------------------


def bert_model(**more: Any) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**decoder_shape(**more)))


@hugging_face
def bert() -> Case:
    return Case(bert_model(), masked_language)


@hugging_face
def xlm_roberta() -> Case:
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    return Case(XLMRobertaForMaskedLM(XLMRobertaConfig(**decoder_shape())), masked_language)


@hugging_face
def deberta_v2() -> Case:
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    shape = decoder_shape(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True)
    config = DebertaV2Config(**shape, norm_rel_ebd="layer_norm", position_biased_input=False)
    return Case(DebertaV2ForMaskedLM(config), masked_language)


@hugging_face
def modernbert() -> Case:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    shape = decoder_shape(embedding_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1, local_attention=8)
    config = ModernBertConfig(**shape, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2)
    return Case(ModernBertForMaskedLM(config), masked_language)


@hugging_face
def electra() -> Case:
    from transformers import ElectraConfig, ElectraForMaskedLM

    return Case(ElectraForMaskedLM(ElectraConfig(**decoder_shape(embedding_size=16))), masked_language)


@hugging_face
def albert() -> Case:
    """One layer with one set of weights, called three times a step."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    shape = decoder_shape(embedding_size=16, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    return Case(AlbertForMaskedLM(AlbertConfig(**shape)), masked_language)


# Hugging Face, encoders with decoders --------------------------------------------------------------------------------


@hugging_face
def t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(**shape, dropout_rate=0.1, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return Case(T5ForConditionalGeneration(config), translation)


@hugging_face
def bart() -> Case:
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    dropout = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    config = BartConfig(vocab_size=VOCAB, d_model=32, max_position_embeddings=64, **sides, **heads, **dropout)
    return Case(BartForConditionalGeneration(config), translation)


@hugging_face
def whisper() -> Case:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    dropout = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        vocab_size=VOCAB,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sides,
        **heads,
        **dropout,
        **ids,
    )

    def batches(i: int) -> Batch:
        features = torch.randn(BATCH, 8, 32, generator=generator(i))
        return {"input_features": features, "labels": tokens(i + 500, length=LENGTH - 3)}

    return Case(WhisperForConditionalGeneration(config), batches)


# Hugging Face, vision ------------------------------------------------------------------------------------------------


@hugging_face
def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = ViTConfig(**shape, **dropout, image_size=16, patch_size=8, num_labels=5)
    return Case(ViTForImageClassification(config), lambda i: images(i, size=16))


@hugging_face
def clip() -> Case:
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(
        text_config={**shape, **ids, "vocab_size": VOCAB, "max_position_embeddings": 16, "attention_dropout": 0.1},
        vision_config={**shape, "image_size": 16, "patch_size": 8, "attention_dropout": 0.1},
        projection_dim=16,
    )

    def batches(i: int) -> Batch:
        ids = tokens(i)
        ids[:, -1] = 2
        return {"input_ids": ids, "pixel_values": images(i, size=16)["pixel_values"], "return_loss": True}

    return Case(CLIPModel(config), batches)


@hugging_face
def resnet() -> Case:
    """Batch norm with running statistics in every block."""
    from transformers import ResNetConfig, ResNetForImageClassification

    shape = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "bottleneck"}
    config = ResNetConfig(**shape, num_labels=5)
    return Case(ResNetForImageClassification(config), lambda i: images(i, size=32))


@hugging_face
def swin() -> Case:
    """Shifted windows, and stochastic depth."""
    from transformers import SwinConfig, SwinForImageClassification

    shape = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.2}
    config = SwinConfig(**shape, **dropout, window_size=4, num_labels=5)
    return Case(SwinForImageClassification(config), lambda i: images(i, size=16))


# Plain PyTorch -------------------------------------------------------------------------------------------------------


class GPTBlock(nn.Module):
    """nanoGPT's block: pre-norm, one projection for queries, keys and values, dropout after attention and MLP."""

    def __init__(self, width: int = 32, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.resid_dropout = nn.Dropout(dropout)

    def attention(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (
            t.view(rows, length, self.heads, width // self.heads).transpose(1, 2)
            for t in self.c_attn(x).split(width, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(rows, length, width)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.resid_dropout(self.c_out(F.gelu(self.c_fc(self.ln_2(x)))))


class NanoGPT(nn.Module):
    """Embeddings tied to the head, learned positions, three blocks; returns logits."""

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(LENGTH, width)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList(GPTBlock(width) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of the next token."""
    ids = batch["args"][0]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@plain_pytorch
def nanogpt() -> Case:
    return Case(NanoGPT(), lambda i: {"args": (tokens(i),)}, next_token_loss)


class ResidualBlock(nn.Module):
    """torchvision's basic block: batch norm and ReLU that writes into its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class ResidualNet(nn.Module):
    """A stem, four residual blocks, a classifier."""

    def __init__(self, channels: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(4)))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def class_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy against classes that the first input decides."""
    return F.cross_entropy(logits, classes_of(batch["args"][0], logits.shape[-1]))


def classes_of(x: Tensor, classes: int) -> Tensor:
    """A class that depends on the input, so that there is something to learn."""
    return (x.flatten(1).sum(1).abs() * 10).long() % classes


@plain_pytorch
def residual_net() -> Case:
    return Case(ResidualNet(), lambda i: {"args": (images(i, size=16)["pixel_values"],)}, class_loss)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` between an embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=48, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)))


@plain_pytorch
def transformer_encoder() -> Case:
    return Case(Encoder(), lambda i: {"args": (tokens(i),)}, next_token_loss)


class RecurrentBlock(nn.Module):
    """An LSTM over time with a residual connection around it."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.lstm(self.norm(x))[0])


class RecurrentNet(nn.Module):
    """Embedding, three recurrent blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.blocks = nn.ModuleList(RecurrentBlock() for _ in range(3))
        self.head = nn.Linear(32, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@plain_pytorch
def lstm_stack() -> Case:
    return Case(RecurrentNet(), lambda i: {"args": (tokens(i),)}, next_token_loss)


class DoubleConv(nn.Module):
    """Two convolutions with group norm and SiLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.GroupNorm(4, channels_out)
        self.conv2, self.norm2 = nn.Conv2d(channels_out, channels_out, 3, padding=1), nn.GroupNorm(4, channels_out)
        self.dropout = nn.Dropout2d(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.conv1(x)))
        return self.dropout(F.silu(self.norm2(self.conv2(x))))


class UNet(nn.Module):
    """Skip connections: what the first block returns is read by the last one, so lifetimes of blocks are not nested."""

    def __init__(self, channels: int = 8, levels: int = 2) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(levels + 1)]
        self.stem = nn.Conv2d(3, channels, 1)
        self.down = nn.ModuleList(DoubleConv(width, width) for width in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(DoubleConv(2 * width, width) for width in widths[:-1])
        self.head = nn.Conv2d(channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for down, shrink in zip(self.down, self.shrink, strict=False):
            x = down(x)
            skips.append(x)
            x = shrink(x)
        x = self.down[-1](x)
        for up, grow, skip in reversed(list(zip(self.up, self.grow, skips, strict=True))):
            x = up(torch.cat([grow(x), skip], dim=1))
        return self.head(x)


def denoising_loss(output: Tensor, batch: Batch) -> Tensor:
    """Mean squared distance to the tanh of the input."""
    return F.mse_loss(output, batch["args"][0].tanh())


@plain_pytorch
def unet() -> Case:
    return Case(UNet(), lambda i: {"args": (images(i, size=16)["pixel_values"],)}, denoising_loss)


# The same again, in other settings ------------------------------------------------------------------------------------


@varied
def llama_padded() -> Case:
    """Left padding that changes from step to step; at every third step there is no mask at all."""
    return Case(llama_model(), lambda i: padded(language(i), i, side="left"))


@varied
def bert_padded() -> Case:
    """Right padding that changes from step to step."""
    return Case(bert_model(), lambda i: padded(masked_language(i), i))


@varied
def llama_eager() -> Case:
    """Attention written out: scores, masks, softmax and its dropout are all saved."""
    return Case(llama_model(attn_implementation="eager"), lambda i: padded(language(i), i, side="left"))


@varied
def bert_eager() -> Case:
    """The same for an encoder."""
    return Case(bert_model(attn_implementation="eager"), lambda i: padded(masked_language(i), i))


@varied
def mixtral_loop() -> Case:
    """Experts in a Python loop over those that got tokens: which ones did depends on data."""
    return Case(mixtral_model(experts_implementation="eager"), language)


@varied
def qwen_moe_loop() -> Case:
    """The same, beside an expert that gets every token."""
    return Case(qwen_moe_model(experts_implementation="eager"), language)


@varied
def gpt2_shared_block() -> Case:
    """The first block again in the place of the third: one module, two calls a step."""
    model = gpt2_model()
    model.transformer.h[2] = model.transformer.h[0]
    return Case(model, language)


NAMES = [*HUGGING_FACE, *PLAIN_PYTORCH, *VARIED]
