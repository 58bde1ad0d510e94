"""Models and batches without contents, and the libraries that would notice."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import _meta_registrations
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from memfit.sharding import as_dtensor, local

_TENSORS = ("_parameters", "_buffers", "_modules")
_SHAPE_OF_GROUPS = "_meta_grouped_mm_common"


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with fake parameters and buffers on CPU; call it inside a `FakeTensorMode`. Nothing is copied."""
    made: torch.nn.Module = copy.deepcopy(model, _fakes_of(model))
    return made


def empty(model: torch.nn.Module) -> None:
    """Give a model that nobody else has fake parameters and buffers on CPU: as `twin`, in place."""
    memo = _fakes_of(model)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = memo[id(tensor)]
        own = vars(module)
        for name in [name for name in own if name not in _TENSORS and _holds_tensors(own[name])]:
            own[name] = copy.deepcopy(own[name], memo)


def _fakes_of(model: torch.nn.Module) -> dict[int, Any]:
    """By identity of the model's tensors, as `copy.deepcopy` takes them."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = torch.nn.Parameter(_empty(parameter), requires_grad=parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = _empty(buffer)
        for name, value in vars(module).items():
            if name not in _TENSORS:
                _add_tensors(value, memo)
    return memo


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    if type(value) is dict:
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, torch.Tensor)


def _add_tensors(value: Any, memo: dict[int, Any]) -> None:
    """Plain attributes may be tensors, or hold some."""
    if isinstance(value, torch.Tensor):
        memo.setdefault(id(value), _empty(value))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add_tensors(item, memo)
    elif type(value) is dict:
        for item in value.values():
            _add_tensors(item, memo)


def uncheckpointed(model: torch.nn.Module) -> tuple[str, ...]:
    """Switch a model's own gradient checkpointing off, since a plan takes its place; says so, if it was on."""
    found = False
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            setattr(module, "gradient_checkpointing", False)  # noqa: B010  # no parameter or module
            found = True
    return ("The model's own gradient checkpointing: a plan takes its place, and `nothing` is without it.",) * found


def fake_batch(batch: Any) -> Any:
    """The same batch, its tensors fake and on CPU."""
    return tree_map(lambda value: _empty(value) if isinstance(value, torch.Tensor) else value, batch)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    held = local(tensor)
    made = torch.empty_strided(tuple(held.shape), held.stride(), dtype=held.dtype)
    return made if held is tensor else as_dtensor(made, tensor._spec)  # type: ignore[attr-defined]


@contextlib.contextmanager
def fake_tensors(mode: FakeTensorMode | None = None) -> Iterator[FakeTensorMode]:
    """Where tensors are fake and Hugging Face's models do what they do with real ones; again, with its ``mode``.

    They look for fake tensors, and then prepare for being compiled: with masks that an eager step does not make. And
    they look at position ids to see whether sequences are packed, which those made here are not. Products of groups,
    which experts are computed with, take every dtype.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True) if mode is None else mode
    with mode, contextlib.ExitStack() as stack:
        shape = getattr(_meta_registrations, _SHAPE_OF_GROUPS, None)
        stack.enter_context(_replaced(_meta_registrations, _SHAPE_OF_GROUPS, partial(_of_any_dtype, shape)))
        if "transformers" in sys.modules:
            from transformers import masking_utils
            from transformers.utils import import_utils

            stack.enter_context(_replaced(import_utils, "is_fake_tensor", lambda tensor: False))
            stack.enter_context(_replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
        yield mode


def _of_any_dtype(original: Any, first: torch.Tensor, second: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch's own shapes of grouped products are for bf16 and scaled fp8 alone; its kernels take fp32 and fp16 too."""
    if first.dtype not in (torch.float32, torch.float16) or second.dtype is not first.dtype:
        return original(first, second, *args, **kwargs)  # type: ignore[no-any-return]
    shown = [torch.empty_strided(t.shape, t.stride(), dtype=torch.bfloat16, device=t.device) for t in (first, second)]
    made = original(*shown, *args, **kwargs)
    return torch.empty_strided(made.shape, made.stride(), dtype=first.dtype, device=made.device)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
