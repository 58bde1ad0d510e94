"""Every hook that Memfit installs: instances of module-level classes that copy and pickle as inert (rule 17)."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from memfit import flops
from memfit.passes import passes
from memfit.streams import capturing

if TYPE_CHECKING:
    from memfit.blocks import Block
    from memfit.calls import Call
    from memfit.runtime import Runtime


class Listener(Protocol):
    """What an autopilot wants to hear of while it profiles."""

    def block_entered(self, call: Call) -> None:
        """A block's forward begins."""

    def block_left(self, call: Call) -> None:
        """A block's forward has ended, and its frame stands."""

    def backward_entered(self, index: int) -> None:
        """The first saved tensor of block call ``index`` was asked for."""


class Stepper(Protocol):
    """What wants to hear of forwards and optimizer steps."""

    def optimizer_event(self, optimizer: torch.optim.Optimizer, *, before: bool) -> None:
        """Any torch optimizer is about to step, or has stepped."""

    def forward_event(self, module: torch.nn.Module, *, before: bool) -> None:
        """The model's forward begins, or is over."""

    def count_event(self, module: torch.nn.Module, args: Any, kwargs: Any, *, before: bool, failed: bool) -> None:
        """The same, with what the forward is given."""


class BackwardHook:
    """Tells the runtime that the backward has reached a block call."""

    __slots__ = ("index", "runtime")

    def __init__(self, runtime: Runtime, index: int) -> None:
        self.runtime = weakref.ref(runtime)
        self.index = index

    def __call__(self) -> None:
        runtime = self.runtime()
        if runtime is not None:
            runtime.backward_entered(self.index)


@dataclass(slots=True, eq=False)
class RootHook:
    """Counts the forwards of the model."""

    runtime: Runtime | None

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self.runtime is not None:
            self.runtime.generation += 1

    def __deepcopy__(self, memo: Any) -> RootHook:
        return RootHook(None)

    def __reduce__(self) -> Any:
        return RootHook, (None,)


@dataclass(slots=True, eq=False)
class PreHook:
    """Copies and pickles as inert."""

    runtime: Runtime | None
    block: Block | None

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self.runtime is not None and self.block is not None:
            flops.suspend()
            if self.block.resets:
                self.block.resets.enter()
            self.runtime.before(self.block, module, args, kwargs)
            flops.enter(self.block.name)

    def __deepcopy__(self, memo: Any) -> PreHook:
        return PreHook(None, None)

    def __reduce__(self) -> Any:
        return PreHook, (None, None)


@dataclass(slots=True, eq=False)
class PostHook:
    """Copies and pickles as inert."""

    runtime: Runtime | None
    block: Block | None

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self.runtime is not None and self.block is not None:
            flops.suspend()
            if self.block.resets:
                self.block.resets.leave()
            self.runtime.after(self.block, output)
            flops.leave(self.block.name)

    def __deepcopy__(self, memo: Any) -> PostHook:
        return PostHook(None, None)

    def __reduce__(self) -> Any:
        return PostHook, (None, None)


class _Hook:
    """Copies and pickles as inert."""

    __slots__ = ("_before", "_handle")

    def __init__(self, handle: Stepper | None = None, *, before: bool = True) -> None:
        self._handle: Callable[[], Stepper | None] = lambda: handle
        self._before = before

    def handle(self) -> Stepper | None:
        """The handle, if it is still there."""
        return self._handle()

    def __deepcopy__(self, memo: Any) -> _Hook:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


class OptimizerHook(_Hook):
    """A global hook: it must not keep the model alive."""

    __slots__ = ()

    def __init__(self, handle: Stepper | None = None, *, before: bool = True) -> None:
        super().__init__(None, before=before)
        if handle is not None:
            self._handle = weakref.ref(handle)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        handle = self.handle()
        if handle is not None and not capturing():
            if self._before:
                passes.settle()
            handle.optimizer_event(optimizer, before=self._before)


class CountHook(_Hook):
    """Around each forward of the model, with its arguments."""

    __slots__ = ()

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if torch.compiler.is_compiling():
            return
        handle = self.handle()
        if handle is not None and not capturing():
            failed = output is None and sys.exc_info()[0] is not None
            handle.count_event(module, args, kwargs, before=self._before, failed=failed)


class ModelHook(_Hook):
    """Around each forward of the model."""

    __slots__ = ()

    def __call__(self, module: torch.nn.Module, args: Any, output: Any = None) -> None:
        if torch.compiler.is_compiling():
            return
        handle = self.handle()
        if handle is not None:
            handle.forward_event(module, before=self._before)
