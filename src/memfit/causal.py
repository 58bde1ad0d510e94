"""Causal language models of Hugging Face: which part of a model is one, its head, its labels, and its loss."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_LOSSES = "transformers.loss.loss_utils"
_LOSS = "ForCausalLMLoss"


def language_models(model: torch.nn.Module) -> Iterator[Any]:
    """The parts of a model, or it itself, that have a head and a ``loss_function``."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if base is None:
        return
    heads: set[int] = set()
    for module in model.modules():  # the outermost first: it may share the head of one inside
        if isinstance(module, base) and hasattr(type(module), "loss_function"):
            head = head_of(module)
            if head is not None and id(head) not in heads:
                heads.add(id(head))
                yield module


def head_of(model: Any) -> Any:
    """The head of a language model; ``None`` if it has none, or several."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def given_labels(model: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The labels that a forward is given."""
    if "labels" in kwargs or not args:
        return kwargs.get("labels")
    try:
        return inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments.get("labels")
    except (TypeError, ValueError):
        return None


def why_other_loss(function: Any) -> str:
    """Why a loss function is not the one that the chunked loss equals; "" if it is."""
    losses: Any = sys.modules.get(_LOSSES)
    if losses is None or function is not getattr(losses, _LOSS, None):
        return f"the model's `loss_function` is {getattr(function, '__name__', type(function).__name__)}, not {_LOSS}"
    for name in (_LOSS, "fixed_cross_entropy"):
        home = getattr(getattr(losses, name, None), "__module__", "")
        if home != _LOSSES:
            return f"transformers' `{name}` is replaced by one of `{home}`"
    home = str(getattr(torch.nn.functional.cross_entropy, "__module__", ""))
    if not home.startswith(("torch.", "liger_kernel")):
        return f"`torch.nn.functional.cross_entropy` is replaced by one of `{home}`"
    return ""
