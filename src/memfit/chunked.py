"""Linear cross-entropy in chunks of tokens: exact, and the logits are never there as a whole.

The gradient of a cross-entropy needs nothing from the backward but a factor. So the forward takes one chunk of tokens
at a time through the head, turns its logits into their gradient in the same memory, and adds what follows from them to
the gradients of hidden states and head; the backward multiplies by the incoming gradient. Three matrix products, as
many as the plain loss has.

Sources: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009; Hsu et al. 2024,
"Liger Kernel", arXiv:2410.10989, section 3.2, for the gradients in the forward. Differs: no kernels of its own,
nothing is left out (Wijmans et al. skip gradients below the precision), and a half-precision head's gradient is summed
in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memfit.errors import UsageError
from memfit.sums import Sums

SHARE = 0.045
"""Of the plain loss's peak, for all that the chunked one needs beside gradients of parameters."""
MIN_CHUNK_TOKENS = 128
MAX_CHUNK_TOKENS = 1024
"""From here on products with a head are as fast as they get."""

_ROWS_BYTES = {"cpu": 4 << 20}
"""Logits that are worked on at one time, in fp32: what caches hold, else `_OTHER_ROWS_BYTES`."""
_OTHER_ROWS_BYTES = 32 << 20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float | None = None,
    num_items: int | float | Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`` against labels, in chunks.

    Equals ``F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)`` up to the order of sums. The logits are
    computed in the dtype of ``hidden``, or autocast's, and everything after them in fp32 (fp64 for fp64). Gradients
    are computed only of what requires them, and only once: a second derivative is an error.

    Args:
        hidden: Hidden states, ``(..., hidden size)``, contiguous or not.
        weight: The head's, ``(vocabulary, hidden size)``, in the dtype of ``hidden`` unless autocast is on.
        labels: Class indices, ``int64``, in the shape of ``hidden`` without its last dimension, or flat. They are not
            shifted.
        bias: The head's, ``(vocabulary,)``.
        ignore_index: Tokens with this label count for nothing.
        label_smoothing: As `torch.nn.functional.cross_entropy`, from 0 to 1.
        softcap: Bound of the logits; ``None``: none.
        scale: Factor of the logits, before they are capped.
        num_items: What the sum of losses is divided by; ``None``: the number of labels that are not ignored, which
            gives ``nan`` if there are none.
        chunk_tokens: Tokens in a chunk; ``None``: as `choose_chunk_tokens` has it.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64).

    Raises:
        UsageError: Shapes, dtypes or options do not go together.
    """
    _check(hidden, weight, labels, bias, label_smoothing, softcap, chunk_tokens)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    autocast, dtype = autocasts(hidden), logits_dtype(hidden)
    if not autocast and (weight.dtype != dtype or (bias is not None and bias.dtype != dtype)):
        raise UsageError(f"`hidden` is {dtype} and the head {weight.dtype}: give both the same dtype, or use autocast.")
    num_tokens, vocab = flat.shape[0], weight.shape[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if num_items is None:
        divisor = (targets != ignore_index).sum().to(wide)
    else:
        divisor = torch.as_tensor(num_items, device=flat.device).detach().to(wide).reshape(())
    options = _Options(
        dtype=dtype,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        scale=scale,
        chunk_tokens=chunk_tokens or choose_chunk_tokens(num_tokens, vocab, flat.shape[1], dtype),
        counts=num_items is None,
        gradients=torch.is_grad_enabled(),
    )
    if autocast:
        with torch.autocast(hidden.device.type, enabled=False):
            return _apply(flat, weight, bias, targets, divisor, options)
    return _apply(flat, weight, bias, targets, divisor, options)


def autocasts(hidden: Tensor) -> bool:
    """Whether autocast is on where a tensor is."""
    kind = hidden.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def logits_dtype(hidden: Tensor) -> torch.dtype:
    """In which a head computes here and now: that of its input, or autocast's."""
    casts = autocasts(hidden) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(hidden.device.type) if casts else hidden.dtype


def choose_chunk_tokens(num_tokens: int, vocab: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Tokens in a chunk: as many as `SHARE` of the plain loss's peak allows, between the two limits.

    The plain loss holds, for each of ``num_tokens * vocab`` logits, at least the logit, its log-softmax in fp32, and
    in the backward a gradient in fp32: in fp32 12 bytes, in half precision 10.
    """
    plain_bytes = num_tokens * vocab * (8 + dtype.itemsize)
    room = int(SHARE * plain_bytes) - num_tokens * hidden_size * (4 if dtype == torch.float16 else dtype.itemsize)
    fitting = room // (vocab * dtype.itemsize)
    return max(1, min(max(fitting // 64 * 64, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS, num_tokens))


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    chunk_tokens: int | None,
) -> None:
    shapes = f"`hidden` {list(hidden.shape)}, `weight` {list(weight.shape)}, `labels` {list(labels.shape)}"
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise UsageError(f"{shapes} do not go together: `weight` is (vocabulary, hidden size).")
    if labels.shape not in (hidden.shape[:-1], (hidden.shape[:-1].numel(),)):
        raise UsageError(f"{shapes} do not go together: there is one label for each hidden state.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UsageError(f"`bias` {list(bias.shape)} does not belong to `weight` {list(weight.shape)}.")
    if labels.dtype != torch.int64:
        raise UsageError(f"`labels` are {labels.dtype}: give class indices, torch.int64.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise UsageError(f"`label_smoothing={label_smoothing}` is not between 0 and 1.")
    if softcap is not None and not softcap > 0.0:
        raise UsageError(f"`softcap={softcap}` is not positive. Leave it out where logits have no bound.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise UsageError(f"`chunk_tokens={chunk_tokens}` is below 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What a loss is computed with.

    Attributes:
        dtype: Of the logits.
        counts: Whether the divisor is the number of labels that count.
        gradients: Whether any gradient is wanted.
    """

    dtype: torch.dtype
    ignore_index: int
    label_smoothing: float
    softcap: float | None
    scale: float | None
    chunk_tokens: int
    counts: bool
    gradients: bool


def _apply(*args: Any) -> Tensor:
    result: Tensor = _LinearCrossEntropy.apply(*args)  # type: ignore[no-untyped-call]
    return result


def _starts(total: int, size: int) -> Sequence[int]:
    """Where the parts of ``total`` rows begin, ``size`` of them in each but the last."""
    return range(0, total, size)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        divisor: Tensor,
        options: _Options,
    ) -> Tensor:
        wanted = tuple(options.gradients and wants for wants in ctx.needs_input_grad[:3])
        if not any(wanted):
            options = replace(options, gradients=False)
        wide = divisor.dtype
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        ignored = labels == options.ignore_index
        targets = labels.masked_fill(ignored, 0).unsqueeze(1)
        # NOTE [Where the divisor goes]: into the gradient of the logits before that is rounded, as in the plain loss.
        # In fp16 it would underflow: loss scaling comes with the incoming gradient, so there the divisor waits for it.
        late = options.dtype == torch.float16
        factor = divisor.new_ones(()) if late else divisor.reciprocal()
        factors = torch.where(ignored, 0, factor).unsqueeze(1)
        head = weight.to(options.dtype)
        sums = Sums(hidden, weight, bias, wanted, options.dtype, wide)
        size = min(options.chunk_tokens, max(1, len(hidden)))
        buffer = torch.empty(size, len(weight), dtype=options.dtype, device=hidden.device)
        rows = max(1, _ROWS_BYTES.get(hidden.device.type, _OTHER_ROWS_BYTES) // max(1, len(weight) * wide.itemsize))
        for start in _starts(len(hidden), size):
            chunk = hidden[start : start + size].to(options.dtype)
            logits = buffer[: len(chunk)]
            if bias is None:
                torch.mm(chunk, head.t(), out=logits)
            else:
                torch.addmm(bias.to(options.dtype), chunk, head.t(), out=logits)
            for first in _starts(len(chunk), rows):
                at = slice(start + first, min(start + first + rows, start + len(chunk)))
                part = logits[first : first + rows]
                values = part.to(wide)
                losses[at] = _differentiate(values, targets[at], factors[at], options)
                if options.gradients and values is not part:
                    part.copy_(values)
            if options.gradients:
                sums.add(start, chunk, head, logits)
        ctx.late = late
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        # Where no label counts every gradient is 0, whatever it is divided by.
        ctx.save_for_backward(divisor.clamp(min=1) if options.counts else divisor, sums.hidden, sums.bias, *sums.weight)
        return losses.masked_fill_(ignored, 0).sum() / divisor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _gradients(ctx, gradient)
        if torch.is_grad_enabled():  # `create_graph`: as constants they would have other derivatives than they have
            found = [t if t is None else _Once.apply(t.requires_grad_()) for t in found]  # type: ignore[no-untyped-call]
        return *found, None, None, None


class _Once(torch.autograd.Function):
    """Not `once_differentiable`: that takes gradients for constants where the incoming one is a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise UsageError(
            "The chunked loss computes its gradients in the forward pass and has no second derivative. Use the plain "
            "loss for it: `chunked_loss=False`, or `torch.nn.functional.cross_entropy`."
        )


def _gradients(ctx: Any, gradient: Tensor) -> list[Tensor | None]:
    """Of hidden states, head and bias, for the incoming gradient of the loss."""
    divisor, hidden, bias, *weight = ctx.saved_tensors
    # A graph that is kept may be walked again: its sums stay as they are. Else they become the gradients, and nobody
    # else may hold them, or autograd would copy them into `.grad`.
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    ctx.maybe_clear_saved_tensors()
    scale = gradient / divisor if ctx.late else gradient
    # On other devices reading it would wait for them. A fake tensor has no value to read.
    is_one = type(scale) is Tensor and scale.device.type == "cpu" and scale.item() == 1.0
    factor = None if is_one else scale
    of_hidden, of_weight, of_bias = ctx.dtypes
    parts: list[Tensor] = []
    weight.reverse()
    while weight:
        parts.append(_scaled(weight.pop(), factor, of_weight, keep=kept))
    return [
        None if hidden is None else _scaled(hidden, factor, of_hidden, keep=kept),
        None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts),
        None if bias is None else _scaled(bias, factor, of_bias, keep=kept),
    ]


def _scaled(values: Tensor, scale: Tensor | None, dtype: torch.dtype, *, keep: bool) -> Tensor:
    """Values times a scale in a dtype, rounded once; in place unless they are to be kept."""
    if scale is None:
        return values.to(dtype, copy=keep)
    if values.dtype.itemsize < scale.dtype.itemsize:
        return values.to(scale.dtype).mul_(scale).to(dtype)
    return (values * scale if keep else values.mul_(scale)).to(dtype)


def _differentiate(logits: Tensor, targets: Tensor, factors: Tensor, options: _Options) -> Tensor:
    """Turn logits, in fp32 or fp64, into ``factors`` times the gradient of the loss.

    Args:
        logits: ``(rows, vocabulary)``, overwritten.
        targets: Class indices, ``(rows, 1)``.
        factors: ``(rows, 1)``, 0 where the label is ignored.
        options: Of the loss.

    Returns:
        The losses, ``(rows,)``.
    """
    slope: Tensor | None = None
    if options.scale is not None:
        logits.mul_(options.scale)
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_()
        if options.gradients:
            slope = logits.square().neg_().add_(1.0)
        logits.mul_(options.softcap)
    smoothing, vocab = options.label_smoothing, logits.shape[1]
    log_softmax = torch.log_softmax(logits, 1)
    losses = log_softmax.gather(1, targets).mul_(smoothing - 1.0)
    if smoothing:
        losses.sub_(log_softmax.mean(1, keepdim=True), alpha=smoothing)
    if options.gradients:
        torch.exp(log_softmax, out=logits)
        logits.mul_(factors)
        at_target = logits.gather(1, targets).sub_(factors, alpha=1.0 - smoothing)
        if smoothing:
            even = factors * (smoothing / vocab)
            logits.sub_(even)
            at_target.sub_(even)
        logits.scatter_(1, targets, at_target)
        if slope is not None:
            logits.mul_(slope)
        if options.scale is not None:
            logits.mul_(options.scale)
    return losses.squeeze(1)
