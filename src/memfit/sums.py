"""The gradients of a linear layer, summed over chunks of tokens."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_NUM_VOCAB_PARTS = 16
_MIN_PART = 1024


class Sums:
    """Gradients of hidden states, head and bias, as far as they are wanted.

    Attributes:
        hidden: ``(tokens, hidden size)``, in the dtype of the logits; for fp16 in fp32. See NOTE
            [Where the divisor goes] in `chunked`.
        weight: In fp32 or wider, since half precision would round at every chunk. Of a head in half precision it is in
            parts, one after the other in the vocabulary, which are rounded one by one.
        bias: ``(vocabulary,)``, in fp32 or wider.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: tuple[bool, ...],
        dtype: torch.dtype,
        wide: torch.dtype,
    ) -> None:
        """Of logits in ``dtype``, in ``wide`` where they are summed."""
        vocab, size = weight.shape
        self.hidden: Tensor | None = None
        self.weight: list[Tensor] = []
        self.bias: Tensor | None = None
        self._step = vocab if dtype == wide else max(_MIN_PART, -(-vocab // _NUM_VOCAB_PARTS))
        if wanted[0]:
            kept = wide if dtype == torch.float16 else dtype
            self.hidden = torch.empty(hidden.shape, dtype=kept, device=hidden.device)
        if wanted[1]:
            make = torch.empty if len(hidden) else torch.zeros
            step = vocab if weight.dtype == wide else self._step
            lengths = [min(step, vocab - at) for at in range(0, vocab, step)]
            self.weight = [make(length, size, dtype=wide, device=weight.device) for length in lengths]
        if wanted[2] and bias is not None:
            self.bias = torch.zeros(vocab, dtype=wide, device=bias.device)

    def add(self, start: int, chunk: Tensor, head: Tensor, gradient: Tensor) -> None:
        """Add what follows from the gradient of the logits of a chunk of tokens, the ``start``-th and following."""
        if self.hidden is not None:
            into = self.hidden[start : start + len(chunk)]
            if into.dtype == gradient.dtype:
                torch.mm(gradient, head, out=into)
            else:
                into.copy_(gradient @ head)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        at = 0
        for whole in self.weight:
            wide = None if gradient.dtype == whole.dtype else chunk.to(whole.dtype)
            for part in torch.split(whole, self._step):
                _add_product(part, gradient[:, at : at + len(part)], chunk, wide, is_first=start == 0)
                at += len(part)


def _add_product(total: Tensor, gradient: Tensor, chunk: Tensor, wide: Tensor | None, *, is_first: bool) -> None:
    """``total += gradient.T @ chunk`` in the dtype of ``total``; ``wide`` is ``chunk`` in that, where it is another."""
    if wide is not None and _sums_in_fp32(total.device, gradient.dtype):
        beta = 0 if is_first else 1
        torch.addmm(total, gradient.t(), chunk, out_dtype=total.dtype, beta=beta, out=total)
        return
    if wide is not None:
        gradient, chunk = gradient.to(total.dtype), wide
    if is_first:
        torch.mm(gradient.t(), chunk, out=total)
    else:
        total.addmm_(gradient.t(), chunk)


@functools.cache
def _sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether half-precision matrices can be multiplied into an fp32 sum here; tried once, with sums that need fp32."""
    if device.type in ("cpu", "meta"):
        return False
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    added, made = torch.full((2, 16, 16), 2.0**20 + 1.0, device=device).unbind()
    made.fill_(torch.nan)
    try:
        torch.addmm(added, ones.t(), ones, out_dtype=torch.float32, out=added)
        torch.addmm(made, ones.t(), ones, out_dtype=torch.float32, beta=0, out=made)
    except (RuntimeError, TypeError):
        return False
    return bool((added == 2.0**20 + 17.0).all()) and bool((made == 16.0).all())
