"""Base weights in 4 or 8 bits, as bitsandbytes keeps them: their bytes, and what its linear layers work with and keep.

Nothing is quantized: the layers stand in a model of fake tensors. Sizes and temporaries are those of bitsandbytes 0.50.

Source:
    Dettmers et al. 2023, "QLoRA", arXiv 2305.14314: NF4 in blocks of 64, their scales in 8 bits, in blocks of 256.
    Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339: rows in 8 bits, a scale each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from memfit.errors import ModelError, UsageError
from memfit.predictions import QUANTIZED

_BLOCK, _SCALE_BLOCK, _CODE, _SCALE_CODE = 64, 256, 16, 256
_THRESHOLD = 6.0
_NOTE = "What `prepare_model_for_kbit_training` casts to fp32: norms, embeddings and the head keep their dtype here."
_EXPERTS_NOTE = (
    "Quantized experts: bitsandbytes packs linear layers, and experts that are one parameter keep their dtype."
)
_EIGHT_BIT_NOTES = (
    "8-bit layers keep their inputs beside autograd: gradient checkpointing lets go of some that are counted here.",
    "That `fit` leaves blocks with 8-bit layers alone: peaks with recomputation are those of gradient checkpointing.",
)


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is packed and does not train. All but the weight are buffers, which count with it.

    Attributes:
        num_weights: Of the layer, however they are packed.
    """

    def __init__(self, linear: nn.Module, *, bits: int) -> None:
        """In the place of a `Linear`, or of transformers' `Conv1D`, whose weight is transposed."""
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, torch.Tensor)
        rows, columns = weight.shape if isinstance(linear, nn.Linear) else weight.shape[::-1]
        super().__init__(columns, rows, bias=False, device=weight.device)
        self.bits, self.num_weights, self.dtype = bits, rows * columns, weight.dtype
        if isinstance(bias, nn.Parameter):
            self.bias = bias
        size = [rows, columns] if bits == 8 else [-(-rows * columns // 2), 1]
        packed = torch.empty(size, dtype=torch.int8 if bits == 8 else torch.uint8, device=weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name, count, dtype in _statistics(rows, columns, bits):
            self.register_buffer(name, torch.empty(count, dtype=dtype, device=weight.device), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `bitsandbytes.nn.Linear4bit` and `Linear8bitLt`: only the gradient of the input is ever needed."""
        size = (self.out_features, self.in_features)
        if self.bits == 8:
            return _EightBit.apply(input, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]
        # PEFT copies what a 4-bit layer returns.
        found: torch.Tensor = _FourBit.apply(input, self.weight, self.bias, size)  # type: ignore[no-untyped-call]
        return found.clone()


class _FourBit(torch.autograd.Function):
    """`MatMul4Bit`: the weight is made whole for the product, and again in the backward; nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, size: Any) -> Any:
        ctx.packed, ctx.size = packed, size
        return nn.functional.linear(x, _whole(packed, size, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return torch.matmul(gradient, _whole(ctx.packed, ctx.size, gradient.dtype)), None, None, None


class _EightBit(torch.autograd.Function):
    """`MatMul8bitLt`: the input is kept, by a context that no plan can reach; the product is made in 32 bits first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        ctx.tensors, ctx.size, ctx.packed = rows, x.shape, packed
        half = rows.to(torch.float16)
        outliers = half.abs() >= _THRESHOLD
        quantized = half.to(torch.int8)
        del half, outliers
        product = nn.functional.linear(quantized.to(x.dtype), packed.to(x.dtype))
        wide = product.to(torch.int32)
        del product, quantized
        result = wide.to(x.dtype)
        if bias is not None:
            result = result + bias
        return result.reshape(*x.shape[:-1], packed.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows = gradient.reshape(-1, gradient.shape[-1])
        return torch.matmul(rows, ctx.packed.to(rows.dtype)).view(ctx.size), None, None


def _whole(packed: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    count = size[0] * size[1]
    return packed.expand(-1, 2).to(dtype, memory_format=torch.contiguous_format).view(-1)[:count].view(size)


def _statistics(rows: int, columns: int, bits: int) -> Iterable[tuple[str, int, torch.dtype]]:
    if bits == 8:
        return [("scales", rows, torch.float32)]
    blocks = -(-rows * columns // _BLOCK)
    return [
        ("absmax", blocks, torch.uint8),
        ("absmax_scales", -(-blocks // _SCALE_BLOCK), torch.float32),
        ("absmax_code", _SCALE_CODE, torch.float32),
        ("offset", 1, torch.float32),
        ("code", _CODE, torch.float32),
    ]


def quantize(model: nn.Module, kind: str) -> None:
    """Put quantized layers in the place of a model's, all but those that transformers leaves alone; on meta tensors.

    Args:
        model: Of transformers.
        kind: One of `QUANTIZED`.

    Raises:
        UsageError: No such kind.
        ModelError: There is nothing to quantize.
    """
    if kind not in QUANTIZED:
        raise UsageError(f"There is no quantization `{kind}`. Known are {', '.join(f'`{k}`' for k in QUANTIZED)}.")
    from transformers.pytorch_utils import Conv1D

    left = _not_converted(model)
    named = [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    chosen = [(name, module) for name, module in named if not any(_within(name, key) for key in left)]
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no linear layer to quantize. Leave `quantize` out.")
    for name, module in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear(module, bits=4 if kind == "4bit" else 8))


def notes(kind: str | None, model: nn.Module) -> tuple[str, ...]:
    """What predictions with such weights leave out, as sentences."""
    if kind is None:
        return ()
    experts = any(p.dim() == 3 and p.size(0) > 1 for p in model.parameters())
    return (_NOTE, *([_EXPERTS_NOTE] if experts else []), *(_EIGHT_BIT_NOTES if kind == "8bit" else ()))


def num_parameters(model: nn.Module) -> int:
    """Of a model, quantized ones as many as they stand for."""
    packed = {module.weight: module.num_weights for module in model.modules() if isinstance(module, QuantizedLinear)}
    return sum(packed.get(p, p.numel()) for p in model.parameters())


def _not_converted(model: nn.Module) -> list[str]:
    try:
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError:  # an older transformers
        from transformers.integrations import get_keys_to_not_convert
    return [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]


def _within(name: str, key: str) -> bool:
    """As transformers' `should_convert_module` matches names: a part from the start, or any end."""
    return name.startswith(f"{key}.") or name.endswith(key)
