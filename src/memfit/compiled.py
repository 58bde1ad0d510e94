"""Compiled modules: their Python does not run, so nothing in them can be recorded. They are left alone, and named."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from memfit.blocks import Block

COMPILED = "compiled by torch.compile"
_SCRIPTED = "TorchScript takes no hooks"


def split_compiled(
    model: torch.nn.Module, found: Iterable[tuple[str, torch.nn.Module]]
) -> tuple[list[tuple[str, torch.nn.Module]], list[Block]]:
    """Blocks that can be hooked, and those that are compiled themselves, in a part, or as a part of something."""
    pairs = list(found)
    around: dict[str, str] = {}
    for name, module in model.named_modules():
        why = _why(module)
        if why:
            around[name] = why
    own: list[tuple[str, torch.nn.Module]] = []
    left: list[Block] = []
    for name, module in pairs:
        reasons = [
            why if place == name else f"`{place or type(model).__name__}` is {why}" if why == COMPILED else why
            for place, why in around.items()
            if name == place or not place or name.startswith(f"{place}.") or place.startswith(f"{name}.")
        ]
        if reasons:
            left.append(Block(name=name, module=module, mode="plain", reason=reasons[0]))
        else:
            own.append((name, module))
    return own, left


def compiled_notes(blocks: Iterable[Block], *, steps: int, begun: bool) -> list[str]:
    """What the report says of a model that is compiled: before it was fitted, or afterwards."""
    every = list(blocks)
    left = [block for block in every if block.mode == "plain" and block.reason.endswith((COMPILED, _SCRIPTED))]
    notes: list[str] = []
    if left:
        which = "every block" if len(left) == len(every) else f"{len(left)} of {len(every)} blocks"
        notes.append(f"stepped aside: {which} is compiled; fit the model without `torch.compile`")
    later = [block.name for block in every if block.mode not in ("plain", "policy") and _why(block.module)]
    if later:
        notes.append(f"stepped aside: `{later[0]}` was compiled after `fit`; leave `torch.compile` out")
    if steps and not begun and len(left) < len(every):
        notes.append(
            f"the optimizer stepped {steps} times, but no training forward was seen: the model was compiled after "
            "`fit`, or its `forward` is not called through the model"
        )
    return notes


def is_wrapper(module: torch.nn.Module) -> bool:
    """Whether it is what `torch.compile` returns for a module."""
    return type(module).__name__ == "OptimizedModule"


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether calls of it run compiled code."""
    return _why(module) == COMPILED


def _why(module: torch.nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return _SCRIPTED
    forward = getattr(module, "forward", None)
    if (
        getattr(module, "_compiled_call_impl", None) is not None
        or is_wrapper(module)
        or hasattr(forward, "_torchdynamo_orig_callable")
    ):
        return COMPILED
    return ""
