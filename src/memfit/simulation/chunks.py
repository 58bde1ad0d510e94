"""The chunked loss on fake tensors: the same `linear_cross_entropy`, the head and the loss function replaced around it.

Where a model makes something of its logits before the loss, nothing is predicted: what `fit` folds into the loss there
(scales, caps) would here be computed on logits that take no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from memfit import chunked
from memfit.causal import head_of, language_models
from memfit.simulation.ledger import Ledger

_CHUNKS = 3


class NotChunkedError(Exception):
    """The loss of this model is not one of its head's logits alone."""


class _Waiting:
    """A head that keeps its input, and a loss function that takes it."""

    def __init__(self, head: torch.nn.Linear) -> None:
        self._head = head
        self._hidden: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the right shape that share one element."""
        self._hidden = hidden
        self._logits = hidden.new_empty(1).expand(*hidden.shape[:-1], self._head.weight.shape[0])
        return self._logits

    def loss(
        self,
        logits: Any,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As transformers' `ForCausalLMLoss`."""
        hidden, self._hidden = self._hidden, None
        if hidden is None or logits is not self._logits:
            raise NotChunkedError
        shifted = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return chunked.linear_cross_entropy(
            hidden, self._head.weight, shifted, bias=self._head.bias, ignore_index=ignore_index
        )


@contextlib.contextmanager
def chunked_loss(model: torch.nn.Module, *, cuda: bool) -> Iterator[bool]:
    """A language model whose loss is computed in chunks; yields whether it is one.

    Args:
        model: On fake tensors.
        cuda: Whether rows are differentiated as many at a time as on CUDA.
    """
    found = [(module, head_of(module)) for module in language_models(model)]
    heads = [(module, head) for module, head in found if type(head) is torch.nn.Linear]
    rows = dict(chunked._ROWS_BYTES)
    if cuda:
        chunked._ROWS_BYTES["cpu"] = chunked._OTHER_ROWS_BYTES
    try:
        for module, head in heads:
            waiting = _Waiting(head)
            head.__dict__["forward"] = waiting.forward
            module.__dict__["_loss_function"] = waiting.loss
        yield bool(heads)
    finally:
        chunked._ROWS_BYTES.update(rows)
        for module, head in heads:
            head.__dict__.pop("forward", None)
            module.__dict__.pop("_loss_function", None)


@contextlib.contextmanager
def chunks_alike(ledger: Ledger) -> Iterator[None]:
    """Inside, one chunk of a loss stands for all but the first and the last, which are the ones that may differ."""
    original = chunked._starts

    def starts(total: int, size: int) -> Iterator[int]:
        numbers = original(total, size)
        if len(numbers) <= _CHUNKS:
            yield from numbers
            return
        before = ledger.repeats
        yield numbers[0]
        ledger.repeats = before * (len(numbers) - 2)
        try:
            yield numbers[1]
        finally:
            ledger.repeats = before
        yield numbers[-1]

    chunked._starts = starts  # type: ignore[assignment]
    try:
        yield
    finally:
        chunked._starts = original
