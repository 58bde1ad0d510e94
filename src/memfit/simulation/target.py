"""What another device runs where this one, without it, would run other kernels.

The step is traced on fake CPU tensors: CUDA's need a CUDA build for their backward. Which kernel attention and dropout
take decides much of what autograd keeps, so on the way to a CUDA target these two are replaced by CUDA's own ops, whose
fake kernels and derivatives are device-independent:

- dropout: `native_dropout`, which keeps a bool mask; on CPU a mask of the input's dtype is kept.
- attention (SDPA): FlashAttention in half precision without a mask, else the memory-efficient kernel; both keep output
  and log-sum-exp. A mask of booleans becomes one of numbers, as `scaled_dot_product_attention` makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_HALVES = (torch.float16, torch.bfloat16)
_MAX_FLASH_HEAD = 256


class CudaKernels(TorchFunctionMode):
    """Runs CUDA's attention and dropout on fake tensors of any device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in (functional.dropout, torch.dropout):
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, train: bool | None = None, inplace: bool = False
) -> torch.Tensor:
    if inplace or not (training if train is None else train) or p == 0:
        return functional.dropout(input, p, training if train is None else train, inplace)
    result: torch.Tensor = torch.native_dropout(input, p, True)[0]
    return result


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    alike = query.size(-1) == value.size(-1) <= _MAX_FLASH_HEAD
    flash = query.dtype in _HALVES and attn_mask is None and alike
    if enable_gqa and not flash:
        repeats = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    if flash:
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
    else:
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = zeros.masked_fill(attn_mask.logical_not(), float("-inf"))
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.size(-2))
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
        )
    result: torch.Tensor = found[0]
    return result
