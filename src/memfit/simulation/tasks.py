"""What people train: a model from its configuration, a batch, and the loss: inside `fake_tensors()`, or on a device."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from memfit import known
from memfit.arguments import check_positive
from memfit.errors import ModelError, UnknownNameError, UsageError
from memfit.predictions import PRECISIONS, TASKS
from memfit.simulation import flash, quantized
from memfit.simulation.fakes import empty

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Split = Callable[[torch.nn.Module], None]
"""What splits the layers of a model among devices, where they do that, before it gets adapters."""
MAX_TOKENS = 2**36
"""Of a batch: sizes of tensors beyond it may not be numbers of a machine."""
_FROM_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "xmod")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A loss that reads nothing but embeddings, whose gradients can be cached.

    Attributes:
        batches: What is encoded, one after the other.
        encode: One embedding for each row of a batch.
        loss: Of the embeddings of all batches.
    """

    batches: tuple[dict[str, torch.Tensor], ...]
    encode: Callable[[dict[str, torch.Tensor]], torch.Tensor]
    loss: Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A step to rehearse.

    Attributes:
        model: In training mode; on fake tensors, unless it was built on a device.
        batch: Its inputs.
        loss: Runs the forward.
        tokens: In the batch; ``None`` where it has none.
        title: What a report calls the model, if not by its class.
        contrast: What the step consists of, if it is a contrastive one.
        notes: What a prediction of it leaves out.
    """

    model: torch.nn.Module
    batch: Any
    loss: Callable[[], torch.Tensor]
    tokens: int | None
    title: str = ""
    contrast: Contrast | None = None
    notes: tuple[str, ...] = ()


def task_of(config: Any) -> str:
    """The task that a configuration is usually trained for: of a known model its own, else from its architecture."""
    with contextlib.suppress(UnknownNameError):
        task = known.find(getattr(config, "name_or_path", None) or "").task
        if task in TASKS:
            return task
    names = " ".join(getattr(config, "architectures", None) or ())
    if "ForSequenceClassification" in names:
        return "classification"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if "ImageClassification" in names or config.model_type in ("vit", "dinov2", "swin"):
        return "image"
    causal = "CausalLM" in names or "LMHead" in names
    return "causal-lm" if causal or getattr(config, "is_decoder", False) else "embedder"


def positions_of(config: Any) -> int | None:
    """The longest sequence that a model takes; ``None`` where its configuration names no limit."""
    text = getattr(config, "get_text_config", lambda: config)()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    found = [limit for limit in limits if isinstance(limit, int)]
    if not found:
        return None
    # RoBERTa's positions begin after that of padding.
    taken = (getattr(text, "pad_token_id", None) or 0) + 1 if text.model_type in _FROM_PADDING else 0
    return min(found) - taken


def build(
    config: Any,
    *,
    task: str,
    batch_size: int,
    length: int,
    precision: str = "fp32",
    attention: str | None = None,
    lora: int | None = None,
    lora_targets: Sequence[str] | None = None,
    lora_dropout: float = 0.0,
    freeze: Iterable[str] = (),
    padded: bool = False,
    group: int = 8,
    temperature: float = 0.02,
    quantize: str | None = None,
    device: torch.device | None = None,
    split: Split | None = None,
) -> Job:
    """A model of a configuration, and one batch of the task.

    Args:
        config: A configuration of transformers.
        task: One of `TASKS`.
        batch_size: Rows; for an embedder queries, for a reranker queries too, each with ``group`` passages.
        length: Tokens of each row.
        precision: One of `PRECISIONS`: of the weights; mixed ones keep them in fp32 and autocast.
        attention: As transformers' ``attn_implementation``; ``flash`` is ``flash_attention_2``.
        lora: Rank of LoRA adapters (PEFT's), if any.
        lora_targets: Names of the modules that get adapters; all linear layers of the blocks by default.
        lora_dropout: Of the adapters.
        freeze: Parts of parameter names that do not train.
        padded: Whether rows are padded, so that attention has a mask.
        group: Passages for each query.
        temperature: Of the contrastive loss.
        quantize: One of `QUANTIZED`: the base weights under the adapters.
        device: Where to build it with random weights and random tokens; by default all is fake.
        split: Called with the model before it gets adapters.

    Raises:
        UsageError: No such task or precision; a length beyond the model's positions; targets that match nothing.
        ModelError: The configuration has no model for the task.
    """
    if task not in TASKS:
        raise UsageError(f"There is no task `{task}`. Known are {', '.join(f'`{t}`' for t in TASKS)}.")
    if precision not in PRECISIONS:
        raise UsageError(f"There is no dtype `{precision}`. Known are {', '.join(f'`{p}`' for p in PRECISIONS)}.")
    for name, value in (("batch", batch_size), ("seq", length), ("group", group)):
        check_positive(name, value)
    if not temperature > 0:
        raise UsageError(f"`temperature={temperature}` is not above 0.")
    if batch_size * group * length > MAX_TOKENS:
        raise UsageError(f"`batch={batch_size}` rows of `seq={length}` are more than any device holds.")
    config = copy.deepcopy(config)
    positions = positions_of(config)
    if positions is not None and length > positions and task != "image":
        raise UsageError(
            f"`seq={length}` is beyond the {positions} positions of this {config.model_type}. Give at most {positions}."
        )
    # Libraries move modules about, which fake ones cannot be.
    apart = _disable_current_modes() if device is None else contextlib.nullcontext()
    with apart, torch.device("meta" if device is None else device):
        flashes = attention in flash.NAMES
        if flashes:
            if precision == "fp32":
                raise UsageError(f"`{attention}` computes in half precision: give a dtype such as `bf16`.")
            attention = flash.register() if device is None else "flash_attention_2"
        model = _model(config, task, DTYPES.get(precision, torch.float32), attention)
        if flashes and not model._supports_flash_attn:
            raise UsageError(f"{type(model).__name__} has no flash attention: leave `attention` out.")
        title = type(model).__name__
        if quantize is not None:
            _check_quantized(lora, device)
            quantized.quantize(model, quantize)
            title = f"{title} in {quantize.removesuffix('bit')} bits"
        if split is not None:
            split(model)
        if lora is not None:
            title = f"{title} with LoRA"
            model = _with_lora(model, lora, lora_targets, lora_dropout)
    if device is None:
        empty(model)
    _freeze(model, freeze)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"No parameter of {type(model).__name__} trains: nothing is kept for a backward.")
    model.train()
    place = torch.device("cpu") if device is None else device
    autocast = _autocast(precision, place.type)
    notes = (*quantized.notes(quantize, model), *([flash.NOTE] if flashes else []))
    if task == "embedder":
        with place:
            pairs = {
                name: _tokens(config, rows, length, padded=True, real=device is not None)
                for name, rows in (("query", batch_size), ("passages", batch_size * group))
            }
        made = _embedder(model, title, pairs, batch_size, group, temperature, autocast)
        return replace(made, notes=notes)
    rows = batch_size * group if task == "reranker" else batch_size
    with place:
        batch = _batch(
            config, task, rows, length, padded, DTYPES.get(precision, torch.float32), real=device is not None
        )

    def loss() -> torch.Tensor:
        with autocast():
            output = model(**batch)
        if task == "reranker":
            scores = output.logits.view(batch_size, group)
            return torch.nn.functional.cross_entropy(
                scores.float(), torch.zeros(batch_size, dtype=torch.long, device=scores.device)
            )
        found: torch.Tensor = output.loss
        return found

    tokens = None if task == "image" else rows * length
    return Job(model=model, batch=batch, loss=loss, tokens=tokens, title=title, notes=notes)


def _check_quantized(lora: int | None, device: torch.device | None) -> None:
    if lora is None:
        raise UsageError("Quantized weights do not train: give `lora`, the rank of adapters that do.")
    if device is not None:
        raise UsageError("Quantized weights are predicted only: no real step runs with them. Leave `quantize` out.")


def _model(config: Any, task: str, dtype: torch.dtype, attention: str | None) -> torch.nn.Module:
    import transformers

    config.use_cache = False
    kinds = {
        "causal-lm": "AutoModelForCausalLM",
        "embedder": "AutoModel",
        "reranker": "AutoModelForSequenceClassification",
        "classification": "AutoModelForSequenceClassification",
        "seq2seq": "AutoModelForSeq2SeqLM",
        "image": "AutoModelForImageClassification",
    }
    if task == "reranker":
        config.num_labels = 1
    if task in ("reranker", "classification") and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    kind = kinds[task]
    if task == "seq2seq" and config.model_type == "whisper":
        kind = "AutoModelForSpeechSeq2Seq"
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        made: Any = getattr(transformers, kind).from_config(config, dtype=dtype, **options)
    except (ValueError, ImportError) as error:
        first = str(error).splitlines()[0]
        if attention is not None and (isinstance(error, ImportError) or "attn_implementation" in first):
            raise UsageError(f"There is no attention `{attention}` for this model. {first}") from error
        raise ModelError(f"transformers has no {task} model for `{config.model_type}`: {first}") from error
    if task == "embedder" and config.is_encoder_decoder:
        made = made.get_encoder()
    reads = "pixel_values" if task == "image" else "input_features" if kind.endswith("SpeechSeq2Seq") else "input_ids"
    if made.main_input_name != reads:
        raise UsageError(
            f"{type(made).__name__} reads `{made.main_input_name}`, and the task `{task}` has `{reads}`: give another."
        )
    return made  # type: ignore[no-any-return]


def _with_lora(model: torch.nn.Module, rank: int, targets: Sequence[str] | None, dropout: float) -> torch.nn.Module:
    try:
        import peft
    except ModuleNotFoundError:
        raise UsageError("LoRA needs PEFT: `pip install peft`.") from None
    if rank < 1:
        raise UsageError(f"`lora={rank}` is no rank. Give a positive integer.")
    chosen: Any = list(targets) if targets else "all-linear"
    adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=chosen)
    try:
        with warnings.catch_warnings():  # PEFT reads a property that transformers has renamed
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated", FutureWarning)
            # Its own patterns for experts, some of which meet none.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)  # GPT-2's layers: PEFT sets it
            made: torch.nn.Module = peft.get_peft_model(model, adapters)
    except ValueError as error:
        raise UsageError(f"LoRA found nothing to adapt: {str(error).splitlines()[0]}") from error
    return made


def _freeze(model: torch.nn.Module, parts: Iterable[str]) -> None:
    for part in parts:
        named = [p for name, p in model.named_parameters() if part in name]
        if not named:
            raise UsageError(f"`freeze` names `{part}`, which is part of no parameter's name.")
        for parameter in named:
            parameter.requires_grad_(False)


def _autocast(precision: str, device: str) -> Callable[[], Any]:
    if not precision.endswith("-mixed"):
        return contextlib.nullcontext
    dtype = DTYPES[precision.removesuffix("-mixed")]
    return lambda: torch.autocast(device, dtype=dtype)


def _tokens(config: Any, rows: int, length: int, *, padded: bool, real: bool) -> dict[str, torch.Tensor]:
    """Token ids, and a mask that hides the last token of each row."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    if real:
        text = getattr(config, "get_text_config", lambda: config)()
        ids = torch.randint(min(10, text.vocab_size - 1), text.vocab_size, (rows, length))
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones(rows, length, dtype=torch.long)
    if length > 1:
        mask[:, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _batch(
    config: Any, task: str, rows: int, length: int, padded: bool, dtype: torch.dtype, *, real: bool
) -> dict[str, torch.Tensor]:
    numbers: Callable[..., torch.Tensor] = torch.randn if real else torch.empty
    if task == "image":
        size = getattr(config, "image_size", 224)
        pixels = numbers(rows, getattr(config, "num_channels", 3), size, size, dtype=dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}
    batch = _tokens(config, rows, length, padded=padded or task == "reranker", real=real)
    if config.model_type == "whisper":
        frames = 2 * config.max_source_positions
        features = numbers(rows, config.num_mel_bins, frames, dtype=dtype)
        return {"input_features": features, "labels": batch["input_ids"]}
    if task in ("causal-lm", "seq2seq"):
        batch["labels"] = batch["input_ids"].clone()
    elif task == "classification":
        batch["labels"] = torch.zeros(rows, dtype=torch.long)
    return batch


def _embedder(
    model: torch.nn.Module,
    title: str,
    batch: dict[str, dict[str, torch.Tensor]],
    batch_size: int,
    group: int,
    temperature: float,
    autocast: Callable[[], Any],
) -> Job:
    """Queries, then passages, through one encoder; every passage of the batch is a candidate for every query."""

    def encode(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with autocast():
            hidden = model(**inputs).last_hidden_state[:, 0]
        return torch.nn.functional.normalize(hidden, dim=-1)

    def loss_of(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
        scores = queries @ passages.T / temperature
        return torch.nn.functional.cross_entropy(scores.float(), torch.arange(batch_size, device=scores.device) * group)

    tokens = sum(inputs["input_ids"].numel() for inputs in batch.values())
    return Job(
        model=model,
        batch=batch,
        loss=lambda: loss_of(encode(batch["query"]), encode(batch["passages"])),
        tokens=tokens,
        title=title,
        contrast=Contrast(batches=(batch["query"], batch["passages"]), encode=encode, loss=loss_of),
    )
