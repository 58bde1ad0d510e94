"""Patches of other libraries that work on memory or speed themselves, for the report: Liger's kernels, and Unsloth.

They are recognised by what is imported and by what they have put in the place of something else. Memfit changes none of
it. What a kernel computes outside the dispatcher is saved, never run again: see NOTE [Invisible writers] in `trace`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

_LIGER = "liger_kernel"
_UNSLOTH = "unsloth"  # also `unsloth_zoo`, and `unsloth_compiled_module_llama` that it writes
_SAVED = "what kernels compute in replayed blocks is saved, never run again"
_MAX_NAMES = 6
_CHECKPOINTS = (
    ("torch.utils.checkpoint", "checkpoint"),
    ("torch.utils.checkpoint", "CheckpointFunction"),
    ("transformers.modeling_utils", "checkpoint"),
)


def patch_notes(model: torch.nn.Module | None) -> list[str]:
    """What the report says of them; nothing where neither is imported."""
    notes: list[str] = []
    if model is not None and _LIGER in sys.modules:
        names = list(dict.fromkeys(_patched(model, _LIGER)))
        if names:
            notes.append(f"Liger's kernels are at work ({_listed(names)}): {_SAVED}")
        if any(name.endswith("lce_forward") for name in names):
            notes.append("Liger's fused loss is at work: the logits are never there as a whole")
    if _UNSLOTH in sys.modules or f"{_UNSLOTH}_zoo" in sys.modules:
        for place, name in _checkpoints():
            notes.append(f"Unsloth's `{name}` stands in for `{place}`: blocks do not call it, the plan decides instead")
        names = list(dict.fromkeys(_patched(model, _UNSLOTH))) if model is not None else []
        if names:
            notes.append(f"Unsloth's code is at work ({_listed(names)}): {_SAVED}")
    return notes


def _patched(model: torch.nn.Module, package: str) -> Iterator[str]:
    """Names of classes, methods and functions of ``package`` that the model's modules run."""
    namespaces: set[str] = set()
    for module in model.modules():
        kind = type(module)
        if _is_of(kind, package):
            yield kind.__name__
        for function in (module.__dict__.get("forward"), kind.forward):
            if _is_of(function, package) and not _is_of(kind, package):
                yield str(getattr(function, "__qualname__", "forward"))
        if kind.__module__.startswith("transformers."):  # whose functions both replace
            namespaces.add(kind.__module__)
    for namespace in sorted(namespaces & sys.modules.keys()):
        for name, value in list(vars(sys.modules[namespace]).items()):
            if callable(value) and not isinstance(value, type) and _is_of(value, package):
                yield str(getattr(value, "__name__", name))


def _checkpoints() -> Iterator[tuple[str, str]]:
    """Where torch's checkpointing has been replaced by a function or class of Unsloth's, and its name."""
    for place, attribute in _CHECKPOINTS:
        found = getattr(sys.modules.get(place), attribute, None)
        if _is_of(found, _UNSLOTH):
            yield f"{place}.{attribute}", str(getattr(found, "__name__", attribute))


def _is_of(thing: Any, package: str) -> bool:
    return str(getattr(thing, "__module__", "")).startswith(package)


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"
