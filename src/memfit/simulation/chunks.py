"""The chunked loss on fake tensors: the same `linear_cross_entropy`, head and loss function replaced around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from memfit import chunked
from memfit.causal import head_of, language_models
from memfit.heads import read_steps
from memfit.logits import Step, aten
from memfit.simulation.ledger import Ledger

_CHUNKS = 3
_BY_NUMBER = (aten.mul.Tensor, aten.div.Tensor)
_FOLLOWED = {
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply"), aten.mul.Tensor),
    **dict.fromkeys(("div", "__truediv__", "true_divide", "divide"), aten.div.Tensor),
    **dict.fromkeys(("to", "float", "type", "contiguous", "clone"), aten._to_copy.default),
    "tanh": aten.tanh.default,
}


class NotChunkedError(Exception):
    """The loss of this model is not one of its head's logits alone."""


class _Waiting(TorchFunctionMode):
    """A head that keeps its input, a loss function that takes it, and what the model makes of its logits in between.

    Logits share one element here; what is made of them is not computed but written down, as `DeferredLogits` does.
    """

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self._head = head
        self._hidden: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._steps: list[Step] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the right shape."""
        self._hidden, self._steps = hidden, []
        self._logits = hidden.new_empty(1).expand(*hidden.shape[:-1], self._head.weight.shape[0])
        return self._logits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        op = _FOLLOWED.get(getattr(func, "__name__", ""))
        if op is None or self._logits is None or not any(each is self._logits for each in args):
            return func(*args, **kwargs)
        rest = tuple(each for each in args if each is not self._logits)
        if op in _BY_NUMBER and not (len(rest) == 1 and type(rest[0]) in (int, float)):
            return func(*args, **kwargs)
        self._steps.append((op, rest, kwargs))
        if op is aten._to_copy.default:
            shared = func(self._logits[(slice(0, 1),) * self._logits.dim()], *rest, **kwargs)
            self._logits = shared.expand(self._logits.shape)
        else:
            self._logits = self._logits.detach()
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
        hidden, shown = self._hidden, self._logits
        self._hidden = self._logits = None
        factors = read_steps(self._steps)
        if hidden is None or logits is not shown or factors is None:
            raise NotChunkedError
        scale, softcap = factors
        shifted = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return chunked.linear_cross_entropy(
            hidden,
            self._head.weight,
            shifted,
            bias=self._head.bias,
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap,
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
        with contextlib.ExitStack() as stack:
            for module, head in heads:
                waiting = stack.enter_context(_Waiting(head))
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
