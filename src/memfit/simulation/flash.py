"""FlashAttention of the flash-attn package on fake tensors.

The package needs a GPU to be installed, and torch has the same kernel: it keeps queries, keys, values, output and
log-sum-exp, and takes windows and padding without a mask. So that runs instead, as an attention of transformers.
"""

from __future__ import annotations

from typing import Any

import torch

NAMES = ("flash", "flash_attention_2")
NOTE = "What flash-attn does beside its kernel, such as taking padding out of rows: its kernel is torch's own here."
_REGISTERED = "memfit_fused"  # transformers takes a name with "flash" for a package of kernels


def register() -> str:
    """Tell transformers of it; returns the name that it has there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(_REGISTERED, _attend)
    AttentionMaskInterface.register(_REGISTERED, flash_attention_mask)
    return _REGISTERED


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=key.size(1) != query.size(1)
    )
    return found.transpose(1, 2).contiguous(), None
