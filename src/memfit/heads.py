"""The chunked loss of a Hugging Face language model: its head waits, and its loss function takes hidden states.

While a training forward with labels runs, and only then, the head's ``forward`` returns `DeferredLogits`, and the
model's ``loss_function`` is one that computes the loss of those by `linear_cross_entropy`. Whatever else reads them
gets logits. Where anything is not as expected the model runs as it is, and the report says why: nothing here may change
what a loss means.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from memfit.causal import given_labels, head_of, language_models, why_other_loss
from memfit.chunked import autocasts, choose_chunk_tokens, linear_cross_entropy, logits_dtype
from memfit.compiled import is_compiled
from memfit.logits import DeferredLogits, Step, aten, defer
from memfit.sharding import is_sharded
from memfit.units import format_bytes

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class ChunkedLoss:
    """Of one fitted model.

    Attributes:
        left: Why it was left undecided whether to begin; "" where it was not.
    """

    def __init__(self, model: torch.nn.Module, choice: bool | Literal["auto"]) -> None:
        """At work as the ``choice`` says, or after `begin`."""
        self.left = ""
        self._root = weakref.ref(model)
        found = list(language_models(model)) if choice else []
        self._models = [weakref.ref(module) for module in found]
        self._begun = choice is True
        self._hooks: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._aside = ""
        self._why_plain = ""
        self._off = self._unlabelled = False
        self._num_deferred = self._num_chunked = 0
        self._chunk: tuple[int, int] | None = None
        self._read_bytes = 0
        for module in found:
            self._hooks += [
                module.register_forward_pre_hook(_Before(self), with_kwargs=True),
                module.register_forward_hook(_After(self), always_call=True),
            ]

    @property
    def waits(self) -> bool:
        """Whether it may begin: it was left to the solver, and nothing that shows now speaks against it."""
        found = [] if self._begun else [module for module in (each() for each in self._models) if module is not None]
        return bool(found) and not any(self._why_not(module, head_of(module)) for module in found)

    def begin(self) -> None:
        """From this forward on the loss is computed in chunks."""
        self._begun = True

    def gradient_bytes(self) -> int:
        """Of the gradients of heads, which the loss has made when it is over."""
        heads = [head_of(module) for module in (each() for each in self._models) if module is not None]
        return sum(4 * head.weight.numel() for head in heads if head.weight.requires_grad)

    def remove(self) -> None:
        """The model is what it was."""
        self.leave()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def notes(self) -> list[str]:
        """What the report says of it."""
        if not self._begun:
            return [f"`chunked_loss`: {self.left}"] if self.left else []
        notes: list[str] = []
        if self._chunk is not None:
            tokens, logits = self._chunk
            notes.append(
                f"the loss is computed in chunks of {tokens} tokens: logits of {format_bytes(logits)} are never whole"
            )
        reason = self._aside or self._why_compiled()
        if self._unlabelled and self._chunk is None:
            reason = reason or "the model is given no `labels`, so its loss is computed elsewhere"
        if not self._models:
            reason = "this is no language model of transformers; call `memfit.linear_cross_entropy` yourself"
        if reason:
            notes.append(f"`chunked_loss` stepped aside: {reason}")
        if self._read_bytes:
            notes.append(
                f"`.logits` were read after the loss, and computed for that: {format_bytes(self._read_bytes)}, which a "
                "step that does not read them is spared"
            )
        return notes

    def _why_compiled(self) -> str:
        """Compiled forwards run no hooks of ours."""
        modules = (self._root(), *(reference() for reference in self._models))
        return "the model is compiled" if any(m is not None and is_compiled(m) for m in modules) else ""

    # Around a forward

    def enter(self, model: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """A forward of a language model begins."""
        self.leave()  # a KeyboardInterrupt ended the last one
        if not self._begun or self._off or not (model.training and torch.is_grad_enabled()):
            return
        self._unlabelled = given_labels(model, args, kwargs) is None
        if self._unlabelled:
            return
        head: Any = head_of(model)
        self._aside = self._why_not(model, head)
        if self._aside:
            return
        loss_function: Any = model.loss_function
        self._num_deferred = self._num_chunked = 0
        self._why_plain = ""
        _replace(self._undo, head, "forward", _Head(self, head))
        _replace(self._undo, model, "_loss_function", _Loss(self, loss_function))

    def leave(self, *, finished: bool = False) -> None:
        """It is over; ``finished``: by returning."""
        if not self._undo:
            return
        while self._undo:
            self._undo.pop()()
        if not finished or self._num_chunked:
            return
        if self._num_deferred:
            self._off = True
            self._aside = self._why_plain or "the model computes its loss itself, not by its `loss_function`"
        else:
            self._aside = "the model's forward computes its loss without calling its head"

    def _why_not(self, model: Any, head: Any) -> str:
        """Why the model runs as it is; "" if nothing speaks against it."""
        if getattr(model, "_is_replica", False):
            return "`DataParallel` runs copies of the model"
        if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
            return "somebody hooks the forward of every module"
        if type(head) is not torch.nn.Linear:
            return f"the head is a {type(head).__name__}, not a plain `torch.nn.Linear`"
        if "forward" in head.__dict__:
            return "the head's forward is patched"
        if any(getattr(head, name) for name in _HOOKS):
            return "the head has hooks"
        if is_compiled(head) or is_compiled(model):
            return "the model is compiled"
        weight: Any = head.weight
        above = [reference for reference in (self._root, weakref.ref(model)) if reference() is not None]
        if type(weight) is not torch.nn.Parameter or is_sharded(head, above):
            return "the head's weight is sharded, or is not a parameter of its own"
        if not weight.is_floating_point():
            return f"the head's weight is {weight.dtype}"
        if "_loss_function" in model.__dict__:
            return "the model was given a `loss_function` of its own"
        return why_other_loss(model.loss_function)

    # While it runs

    def defer(self, hidden: Tensor, head: torch.nn.Linear) -> Tensor:
        """The head's result."""
        self._num_deferred += 1
        return defer(hidden, head.weight, head.bias, told=_Told(self))

    def loss(
        self, logits: Any, labels: Tensor, vocab_size: int, num_items: Any, ignore_index: int, shift_labels: Any
    ) -> Tensor | None:
        """The loss of logits that nobody has read; ``None`` where there is more to it."""
        if not isinstance(logits, DeferredLogits):
            self._why_plain = "the model makes something else of its logits before the loss"
            return None
        source = logits.source
        weight, hidden = source.weight, source.hidden
        factors = read_steps(source.steps)
        if factors is None or not source.is_pending:
            self._why_plain = "the model does more with its logits than to scale and cap them, before the loss"
            return None
        if shift_labels is None:
            labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        else:
            labels = shift_labels
        one = not isinstance(num_items, Tensor) or num_items.numel() == 1
        if not one or vocab_size != weight.shape[0] or labels.numel() != hidden.shape[:-1].numel():
            self._why_plain = "the model's logits, labels or numbers of items are of other shapes than usual"
            return None
        if labels.dtype != torch.int64 or logits_dtype(hidden) != source.dtype:
            self._why_plain = f"labels are {labels.dtype}, or autocast is another for the head than for the loss"
            return None
        num_tokens, size = labels.numel(), hidden.shape[-1]
        tokens = choose_chunk_tokens(num_tokens, vocab_size, size, source.dtype)
        scale, softcap = factors
        loss = linear_cross_entropy(
            hidden.reshape(-1, size),
            weight,
            labels.reshape(-1).to(hidden.device),
            bias=source.bias,
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap,
            num_items=num_items,
            chunk_tokens=tokens,
        )
        self._num_chunked += 1
        logits_bytes = num_tokens * vocab_size * source.dtype.itemsize
        if self._chunk is None or logits_bytes > self._chunk[1]:
            self._chunk = tokens, logits_bytes
        return loss.float()

    def was_read(self, num_bytes: int) -> None:
        """Logits were computed whole."""
        if not self._undo:
            self._read_bytes = max(self._read_bytes, num_bytes)


def read_steps(steps: Sequence[Step]) -> tuple[float | None, float | None] | None:
    """Scale and softcap, as `linear_cross_entropy` has them, of what a model does to its logits.

    Returns:
        ``None`` where it does something else.
    """
    before = after = 1.0
    capped = False
    for function, rest, _ in steps:
        if function is aten.tanh.default:
            if capped:
                return None
            capped = True
        elif function not in (aten._to_copy.default, aten.clone.default):
            number = float(rest[0])
            number = number if function in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / number if number else 0.0
            if capped:
                after *= number
            else:
                before *= number
    if not capped:
        return (None if before == 1.0 else before), None
    # after * tanh(before * x): with softcap = after, scale = before * after.
    scale = before * after
    if not after > 0.0:
        return None
    return (None if abs(scale - 1.0) < 1e-12 else scale), after


def _replace(undo: list[Callable[[], None]], owner: Any, name: str, value: Any) -> None:
    """Give an object an attribute of its own that it does not have."""
    owner.__dict__[name] = value

    def back() -> None:
        if owner.__dict__.get(name) is value:
            del owner.__dict__[name]

    undo.append(back)


class _Head:
    """In the place of a head's ``forward``."""

    def __init__(self, chunked: ChunkedLoss, head: torch.nn.Linear) -> None:
        self._chunked, self._head = weakref.ref(chunked), weakref.ref(head)

    def __call__(self, input: Tensor) -> Tensor:
        chunked, head = self._chunked(), self._head()
        assert chunked is not None
        assert head is not None
        weight = head.weight
        fits = type(input) is Tensor and input.dim() > 0 and input.device == weight.device and torch.is_grad_enabled()
        same = input.dtype == weight.dtype or autocasts(input)
        if fits and same and input.shape[-1] == weight.shape[1] and (input.requires_grad or weight.requires_grad):
            return chunked.defer(input, head)
        return torch.nn.Linear.forward(head, input)


class _Loss:
    """In the place of a model's ``loss_function``; the arguments are those of transformers' `ForCausalLMLoss`."""

    def __init__(self, chunked: ChunkedLoss, original: Callable[..., Tensor]) -> None:
        self._chunked, self._original = weakref.ref(chunked), original

    def __call__(
        self,
        logits: Any,
        labels: Any,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        chunked = self._chunked()
        loss = None
        if chunked is not None:
            loss = chunked.loss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels)
        if loss is not None:
            return loss
        return self._original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)


class _Told:
    """Hears that logits were computed; holds nothing alive."""

    def __init__(self, chunked: ChunkedLoss) -> None:
        self._chunked = weakref.ref(chunked)

    def __call__(self, num_bytes: int) -> None:
        chunked = self._chunked()
        if chunked is not None:
            chunked.was_read(num_bytes)


class _Hook:
    """Copies and pickles as inert."""

    __slots__ = ("_chunked",)

    def __init__(self, chunked: ChunkedLoss | None = None) -> None:
        self._chunked = chunked

    def __deepcopy__(self, memo: Any) -> _Hook:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


class _Before(_Hook):
    __slots__ = ()

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self._chunked is not None:
            self._chunked.enter(module, args, kwargs)


class _After(_Hook):
    __slots__ = ()

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._chunked is not None:
            self._chunked.leave(finished=output is not None)
