"""Blocks that are as one that was recorded: their forward and backward are passed over.

A model of 80 equal layers runs the code of three. The others get outputs and gradients of the right geometry, so that
everything outside sees the same memory at the same moments. Equal means: the same classes with the same
attributes and parameters of the same geometry throughout, called with the same arguments; two of them were recorded,
gave the same program and left nothing behind, and the last one of the model is recorded too and has to agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from memfit.programs import Program, Value
from memfit.sharding import as_dtensor, local
from memfit.signature import describe

_NUMBERED = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
"""Attributes by which equal layers differ: their place, which caches are asked with."""
_TENSOR = object()
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SKIPPED = (
    *(_NUMBERED + _HOOKS),
    *("_parameters", "_buffers", "_modules"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_SHARDED = "__composable_api_state_key_"
"""Of attributes in which `fully_shard` keeps what it is told."""
_MAX_DEPTH = 4
_PLACE = re.compile(r"\.\d+\.")
"""In a name such as ``model.layers.7.self_attn``, which adapters remember."""


def kind_of(module: torch.nn.Module) -> Hashable:
    """What equal blocks have in common."""
    parts: list[Hashable] = []
    for name, child in module.named_modules():
        plain = [
            (key, _forward(value) if key == "forward" else _of(value))
            for key, value in vars(child).items()
            if key not in _SKIPPED and not key.startswith(_SHARDED)
        ]
        own = [
            (key, tuple(t.shape), t.stride(), t.dtype, t.requires_grad, getattr(t, "placements", None))
            for table in (child._parameters, child._buffers)
            for key, t in table.items()
            if t is not None
        ]
        parts.append((name, type(child), tuple(plain), _hooks(child), tuple(own)))
    return tuple(parts)


def _hooks(module: torch.nn.Module) -> Hashable:
    """What is called around a forward, in order; the numbers under which it is registered are every module's own."""
    found: list[Hashable] = []
    for table in _HOOKS:
        hooks = getattr(module, table)
        with_kwargs = getattr(module, f"{table}_with_kwargs")
        always = getattr(module, f"{table}_always_called", {})
        found.append(tuple((_hook(hook), key in with_kwargs, key in always) for key, hook in hooks.items()))
    return tuple(found)


def _hook(hook: Any) -> Hashable:
    owner = getattr(hook, "__self__", None)
    if type(owner).__module__.startswith("torch.distributed.fsdp."):
        return type(owner), hook.__func__  # every sharded module has a state of its own, which is equal to others
    return getattr(hook, "kind", id(hook))


def _forward(value: Any) -> Hashable:
    """A forward that was given to a module: transformers' tensor parallelism makes one for each, with its style."""
    if not getattr(value, "__module__", "").startswith("transformers.distributed."):
        return id(value)
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    # What is every module's own: itself, its forward, and what has been hooked so far.
    shared = [each for each in cells if not isinstance(each, (torch.nn.Module, dict)) and not callable(each)]
    return value.__qualname__, tuple(id(each) for each in shared)


def _of(value: object, depth: int = 0) -> Hashable:
    """What two attributes that mean the same have in common: plain values by value, what is not plain by identity."""
    if isinstance(value, str):
        return _PLACE.sub(".", value)
    if isinstance(value, _PLAIN):
        return type(value), repr(value)
    if depth < _MAX_DEPTH and isinstance(value, (tuple, list)):
        return type(value), tuple(_of(item, depth + 1) for item in value)
    if depth < _MAX_DEPTH and isinstance(value, (set, frozenset)):
        return type(value), frozenset(_of(item, depth + 1) for item in value)
    if depth < _MAX_DEPTH and isinstance(value, dict):
        return type(value), tuple((_of(key, depth + 1), _of(item, depth + 1)) for key, item in value.items())
    if depth < _MAX_DEPTH and isinstance(value, partial):  # transformers makes one for each activation
        return partial, _of(value.func, depth + 1), _of(value.args, depth + 1), _of(value.keywords, depth + 1)
    return id(value)


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
        saved: Which of them the block's own backward reads.
        leaves: Its outputs, with `_TENSOR` in the place of each tensor.
        structure: Of the outputs.
        seconds, flops: Of its forward.
    """

    index: int
    program: Program
    values: tuple[Value, ...]
    trains: tuple[bool, ...]
    saved: tuple[bool, ...]
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
        saved=tuple(any(s.value.node == value.node for s in program.saved) for value in program.outputs),
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
        ctx.geometry = [_geometry(t) if t.requires_grad else None for t in inputs]
        outputs = [torch.empty_strided(v.size, v.stride, dtype=v.dtype) for v in made.values]
        ctx.mark_non_differentiable(*(t for t, trains in zip(outputs, made.trains, strict=True) if not trains))
        ctx.save_for_backward(*(t for t, saved in zip(outputs, made.saved, strict=True) if saved))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        ctx.entered()
        del gradients
        return (None, None, *(None if each is None else _empty(*each) for each in ctx.geometry))


def _geometry(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, Any]:
    held = local(tensor)
    return tuple(held.shape), held.dtype, None if held is tensor else tensor._spec  # type: ignore[attr-defined]


def _empty(shape: tuple[int, ...], dtype: torch.dtype, layout: Any) -> torch.Tensor:
    made = torch.empty(shape, dtype=dtype)
    return made if layout is None else as_dtensor(made, layout)
