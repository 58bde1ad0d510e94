"""Blocks that are as one that was recorded: their forward and backward are passed over.

A model of 80 equal layers runs the code of three. The others get outputs and gradients of the right geometry, so that
everything outside sees the same memory at the same moments. Equal means: the same classes with the same plain
attributes and parameters of the same geometry throughout, called with the same arguments; two of them were recorded
and gave the same program, and the last one of the model is recorded too and has to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from memfit.programs import Program, Value
from memfit.signature import describe

_NUMBERED = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
"""Attributes by which equal layers differ: their place, which caches are asked with."""
_TENSOR = object()
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def kind_of(module: torch.nn.Module) -> Hashable:
    """What equal blocks have in common."""
    parts: list[Hashable] = []
    for name, child in module.named_modules():
        plain = [(key, repr(v)) for key, v in vars(child).items() if _is_plain(v) and key not in _NUMBERED]
        own = [
            (key, tuple(t.shape), t.stride(), t.dtype, t.requires_grad)
            for table in (child._parameters, child._buffers)
            for key, t in table.items()
            if t is not None
        ]
        hooked = bool(child is not module and (child._forward_hooks or child._forward_pre_hooks))
        parts.append((name, type(child), tuple(plain), tuple(own), hooked and id(child)))
    return tuple(parts)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def key_of(kind: Hashable, tensors: list[torch.Tensor], rest: list[Any]) -> Hashable:
    """What equal calls of equal blocks have in common."""
    first: dict[int, int] = {}
    aliases = tuple(first.setdefault(t.untyped_storage()._cdata, i) for i, t in enumerate(tensors))
    return kind, describe(tensors), aliases, tuple(rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A recorded call that others can be passed over for.

    Attributes:
        index: Of the call.
        program: What it recorded.
        values: Geometry of the tensors among its outputs.
        trains: Which of them need a gradient.
        leaves: Its outputs, with `_TENSOR` in the place of each tensor.
        structure: Of the outputs.
        seconds, flops: Of its forward.
    """

    index: int
    program: Program
    values: tuple[Value, ...]
    trains: tuple[bool, ...]
    leaves: tuple[Any, ...]
    structure: TreeSpec
    seconds: float
    flops: float


def template(index: int, program: Program, output: Any, *, seconds: float, flops: float) -> Template | None:
    """Of a call; ``None`` where its outputs cannot be made from nothing: views, arguments, objects."""
    leaves, structure = tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors or len(tensors) != len(program.outputs) or program.not_replayable or program.writes:
        return None
    for tensor, value in zip(tensors, program.outputs, strict=True):
        node = program.nodes[value.node]
        if node.producer is None or node.storage_bytes != tensor.numel() * tensor.element_size():
            return None
    if len({value.node for value in program.outputs}) != len(tensors):
        return None
    if not all(isinstance(leaf, (torch.Tensor, *_PLAIN)) for leaf in leaves):
        return None
    return Template(
        index=index,
        program=program,
        values=tuple(program.outputs),
        trains=tuple(tensor.requires_grad for tensor in tensors),
        leaves=tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
        structure=structure,
        seconds=seconds,
        flops=flops,
    )


def stand_in(made: Template, inputs: list[torch.Tensor], entered: Callable[[], None]) -> Any:
    """The outputs of a call that is passed over.

    Args:
        made: The call that it is equal to.
        inputs: Its tensor arguments, then the parameters of its block.
        entered: Called when its backward begins.
    """
    tensors = iter(_Double.apply(made, entered, *inputs))  # type: ignore[no-untyped-call]
    leaves = [next(tensors) if leaf is _TENSOR else leaf for leaf in made.leaves]
    return tree_unflatten(leaves, made.structure)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Template, entered: Callable[[], None], *inputs: torch.Tensor) -> Any:
        ctx.entered = entered
        ctx.geometry = [(tuple(t.shape), t.dtype) if t.requires_grad else None for t in inputs]
        outputs = [torch.empty_strided(v.size, v.stride, dtype=v.dtype) for v in made.values]
        ctx.mark_non_differentiable(*(t for t, trains in zip(outputs, made.trains, strict=True) if not trains))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        ctx.entered()
        del gradients
        made = [None if each is None else torch.empty(each[0], dtype=each[1]) for each in ctx.geometry]
        return (None, None, *made)
