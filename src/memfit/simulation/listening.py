"""When modules' forwards and backwards begin and end, told as DeepSpeed's hooks are told.

Read from DeepSpeed 0.19.8, `runtime/zero/parameter_offload.py`. What a module returns goes through a Function whose
backward fetches, what it is given by position through one whose backward releases. Both have DeepSpeed's names, which
are part of a program's key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Take = Callable[..., None]
"""Called with: whether a module is fetched or released, its name, and whether for its backward."""


def listen(model: torch.nn.Module, take: Take) -> list[Any]:
    """Put hooks on every module; returns what removes them."""
    hooks = []
    for name, module in model.named_modules():
        before, after = Hook(partial(_before, take, name), "before"), Hook(partial(_after, take, name), "after")
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    return hooks


def _before(take: Take, name: str, args: Any) -> Any:
    take(True, name)
    if not torch.is_grad_enabled():
        return args
    return _each(args, partial(PostBackwardFunctionModule.apply, _Once(partial(take, False, name, True))))


def _after(take: Take, name: str, output: Any) -> Any:
    take(False, name)
    if not torch.is_grad_enabled():
        return output
    return _each(output, partial(PreBackwardFunctionForModule.apply, partial(take, True, name, True)))


class PreBackwardFunctionForModule(torch.autograd.Function):
    """Around what a module returns."""

    @staticmethod
    def forward(ctx: Any, fetch: Callable[[], None], output: torch.Tensor) -> torch.Tensor:
        ctx.fetch = fetch
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.fetch()
        return None, *gradients


class PostBackwardFunctionModule(torch.autograd.Function):
    """Around what a module is given."""

    @staticmethod
    def forward(ctx: Any, release: _Once, given: torch.Tensor) -> torch.Tensor:
        ctx.release = release
        release.waiting += given.requires_grad
        return given.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.release()
        return None, *gradients


@dataclass(slots=True)
class _Once:
    """Calls when it has been called as often as is waited for."""

    call: Callable[[], None]
    waiting: int = 0

    def __call__(self) -> None:
        self.waiting -= 1
        if not self.waiting:
            self.call()


@dataclass(slots=True)
class Hook:
    """Of a module; `kind` is what that of an equal module has too (see `doubles`)."""

    call: Callable[[Any], Any]
    kind: str

    def __call__(self, module: torch.nn.Module, args: Any, *output: Any) -> Any:
        return self.call(output[0] if output else args)


def _each(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """As DeepSpeed's `apply_to_tensors_only`."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        found = [_each(item, function) for item in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    if isinstance(value, dict):
        for key in value:
            value[key] = _each(value[key], function)
    return value


__all__ = ["listen"]
