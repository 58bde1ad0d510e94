"""Logits that are computed when somebody reads them, and are a tensor like any other until then.

`defer` is a linear layer whose result has shape, dtype, device and a place in autograd's graph, but no memory. Every
operator that reaches it computes the logits first, below autograd, and goes on with them: what is made of them has the
gradients that it would have. A few operators that models put between head and loss (casts, scaling, tanh) are put off
as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from memfit.chunked import logits_dtype
from memfit.errors import ChangedTensorError

aten = torch.ops.aten
Step = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An operator, and its arguments after the first."""

_ALIASES = (aten.detach.default, aten.alias.default)
_UNARY = (aten.tanh.default,)
_BY_NUMBER = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)


class Source:
    """What logits are computed from.

    Attributes:
        hidden: Hidden states as the head was given them, part of autograd's graph.
        weight: The head's.
        bias: The head's.
        dtype: In which the head computes.
        steps: What happens to the logits after the head: operators and the arguments after the first.
        value: The logits, once they have been computed.
        told: Hears of that, with their bytes.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        told: Callable[[int], None] | None,
    ) -> None:
        """Of nothing but the head."""
        self.hidden, self.weight, self.bias, self.dtype, self.told = hidden, weight, bias, dtype, told
        self.steps: tuple[Step, ...] = ()
        self.value: Tensor | None = None
        self._parent: Source | None = None
        self._children: list[weakref.ref[Source]] = []
        self._versions = self._seen()

    def _seen(self) -> list[tuple[int, int]]:
        read = (self.hidden, self.weight, self.bias)
        return [(tensor._version, tensor.data_ptr()) for tensor in read if tensor is not None]

    def followed(self, function: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Source:
        """The same with one more step."""
        child = Source.__new__(Source)
        child.__dict__.update(self.__dict__)
        child.steps = (*self.steps, (function, rest, kwargs))
        child.value, child._parent, child._children = None, self, []
        self._children.append(weakref.ref(child))
        return child

    @property
    def is_pending(self) -> bool:
        """Whether nobody has read or written them yet, at any step."""
        return self.value is None and (self._parent is None or self._parent.is_pending)

    def compute(self) -> Tensor:
        """The logits, computed now unless they were before.

        Raises:
            ChangedTensorError: The head, or its input, is no longer what it was.
        """
        if self.value is None:
            self.value = self._computed()
            if self.told is not None:
                self.told(self.value.nbytes)
        return self.value

    def _computed(self) -> Tensor:
        """The same without keeping what the steps before have made."""
        if self._parent is not None:
            before = self._parent.value
            function, rest, kwargs = self.steps[-1]
            return function(self._parent._computed() if before is None else before, *rest, **kwargs)  # type: ignore[no-any-return]
        if self._seen() != self._versions:
            raise ChangedTensorError(
                "These logits were never computed, since the loss is (`chunked_loss`), and the head or its input has "
                "been written since the forward pass. Read `.logits` before `optimizer.step()`, or leave "
                "`chunked_loss` out."
            )
        hidden, weight, bias = self.hidden.detach(), self.weight.detach(), self.bias
        bias = None if bias is None else bias.detach().to(self.dtype)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.to(self.dtype), weight.to(self.dtype), bias)

    def written(self) -> None:
        """Somebody is about to write into them: what follows from them is computed before."""
        for reference in self._children:
            child = reference()
            if child is not None:
                child.compute()
                child.written()
        self._children.clear()


class DeferredLogits(Tensor):
    """See the module. Until it is read it holds the hidden states, as the graph behind it does."""

    source: Source
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, source: Source, shape: torch.Size, dtype: torch.dtype) -> DeferredLogits:
        """Of a shape and dtype."""
        self: DeferredLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=source.hidden.device)
        self.source = source
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Put off what can be, else compute."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, DeferredLogits) and first.source.value is None:
            put_off = _put_off(func, first, args[1:], kwargs)
            if put_off is not None:
                return put_off
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"`{func}` would change what these logits are. Call `.clone()` on them first.")
        written = _written(func, args, kwargs)
        for logits in written:
            logits.source.compute()
            logits.source.written()
        real_args, real_kwargs = tree_map_only(DeferredLogits, lambda t: t.source.compute(), (args, kwargs))
        result = func(*real_args, **real_kwargs)
        if not written:
            return result
        wrappers = {id(logits.source.value): logits for logits in written}
        return tree_map_only(Tensor, lambda t: wrappers.get(id(t), t), result)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Without computing anything."""
        if self.source.value is not None:
            return repr(self.source.value)
        return f"<logits {list(self.shape)}, {self.dtype}, computed when they are read>"

    # What reads memory past every operator.

    def numpy(self, *, force: bool = False) -> Any:
        """As of any tensor."""
        return self._plain(force=force).numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """As of any tensor."""
        return self._plain().__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def tolist(self) -> Any:
        """As of any tensor."""
        return self._plain(force=True).tolist()

    def data_ptr(self) -> int:
        """Of the logits, which are computed for it."""
        return self.source.compute().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of the logits, which are computed for it."""
        return self.source.compute().untyped_storage()

    def __dlpack__(self, **kwargs: Any) -> Any:
        """As of any tensor."""
        return self._plain().__dlpack__(**kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """They pickle as what they are."""
        return self._plain(force=True).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> Tensor:
        """As of any tensor: only of one that has no graph."""
        if self.grad_fn is not None:
            raise RuntimeError(
                "Only tensors that are no part of a graph can be copied deeply: `.detach()` these logits."
            )
        return self.source.compute().clone()

    def _plain(self, *, force: bool = False) -> Tensor:
        """The logits, which need no gradient."""
        if self.requires_grad and not force:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.source.compute()


def defer(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    told: Callable[[int], None] | None = None,
) -> DeferredLogits:
    """``F.linear(hidden, weight, bias)``, computed when it is read.

    Args:
        hidden: ``(..., hidden size)``.
        weight: ``(vocabulary, hidden size)``.
        bias: ``(vocabulary,)``.
        told: Called with the bytes of the logits when they are computed.

    Returns:
        Logits with the gradients of the linear layer; its dtype is that of autocast where that is on.
    """
    source = Source(hidden, weight, bias, logits_dtype(hidden), told)
    logits: DeferredLogits = _Linear.apply(hidden, weight, bias, source)  # type: ignore[no-untyped-call]
    return logits


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, source: Source) -> DeferredLogits:
        ctx.save_for_backward(hidden, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.dtype = source.dtype
        return DeferredLogits(source, hidden.shape[:-1] + weight.shape[:1], source.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            flat = gradient.reshape(-1, gradient.shape[-1])
            of_hidden = of_weight = of_bias = None
            if ctx.needs_input_grad[0]:
                of_hidden = (flat @ weight.to(ctx.dtype)).view(hidden.shape).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                of_weight = (flat.t() @ hidden.reshape(-1, hidden.shape[-1]).to(ctx.dtype)).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                of_bias = flat.sum(0).to(ctx.bias_dtype)
        return of_hidden, of_weight, of_bias, None


def _put_off(func: Any, logits: DeferredLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> DeferredLogits | None:
    """Logits with one more step, ``None`` where it is not one of those that can wait."""
    source, shape = logits.source, logits.shape
    if func in _ALIASES or (func is aten.view.default and list(rest[0]) == list(shape)):
        return DeferredLogits(source, shape, logits.dtype)
    if func is aten._to_copy.default:
        dtype = kwargs.get("dtype")
        others = any(value is not None and value is not False for key, value in kwargs.items() if key != "dtype")
        if others or dtype is None or not dtype.is_floating_point:
            return None
        return DeferredLogits(source.followed(func, rest, kwargs), shape, dtype)
    if func is aten.clone.default and kwargs.get("memory_format") in (None, torch.preserve_format):
        return DeferredLogits(source.followed(func, rest, kwargs), shape, logits.dtype)
    is_number = len(rest) == 1 and isinstance(rest[0], int | float) and not isinstance(rest[0], bool)
    if kwargs or not ((func in _UNARY and not rest) or (func in _BY_NUMBER and is_number)):
        return None
    return DeferredLogits(source.followed(func, rest, kwargs), shape, logits.dtype)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[DeferredLogits]:
    """The deferred logits among the arguments that an operator writes into."""
    if not func._schema.is_mutable:
        return []
    found: list[DeferredLogits] = []
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        if argument.is_write and isinstance(value, DeferredLogits):
            found.append(value)
    return found
