"""The fallback's frame: all saved tensors of a block come back by running its forward again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch

from memfit import canary
from memfit.errors import ChangedTensorError, RecomputeError
from memfit.frames import Handle, kept
from memfit.inputs import Inputs
from memfit.partitioned import shown_by, staying
from memfit.passes import passes
from memfit.replay import default_generators, generator_of
from memfit.sharding import local, place_of
from memfit.signature import SCALARS, numeric_flags, plain_attributes, set_numeric_flags
from memfit.storages import is_small

WRITTEN = "something that it reads is written after it has run"

_Settings = list[tuple[dict[str, Any], dict[str, Any]]]
"""Dictionaries of a module, and what was in them."""


class ReplayOfModule:
    """Fallback: bring all saved tensors of a block back by running its forward again.

    Only for blocks whose recording wrote nothing and drew no Python randomness (rule 13). The module runs as it was:
    with the parameters and buffers of the first run (rule 8), its plain attributes and the global flags (rule 14).
    """

    __slots__ = (
        "__weakref__",
        "args",
        "autocast",
        "block",
        "defer",
        "distrust",
        "flags",
        "foreign",
        "inputs",
        "kwargs",
        "listener",
        "lock",
        "metas",
        "module",
        "partitioned",
        "samples",
        "settings",
        "sharded",
        "states",
        "task",
        "touched",
        "values",
        "versions",
    )

    def __init__(self, block: str, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """A frame that calls ``module.forward(*args, **kwargs)`` again; tensors among them are detached aliases."""
        self.block = block
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.lock = threading.RLock()
        self.metas: list[tuple[Any, ...]] = []
        self.samples: canary.Samples | None = None
        self.distrust: Callable[[str], None] | None = None
        self.states: dict[torch.device, torch.Tensor] = {}
        self.autocast: list[tuple[str, torch.dtype | None, bool]] = []
        self.values: dict[int, torch.Tensor] = {}
        # Each with its version and place (none where ZeRO-3 moves it), and whether autograd keeps it too.
        self.versions: list[tuple[torch.Tensor, int, int | None, bool]] = []
        self.partitioned: list[torch.nn.Parameter] = []
        self.inputs: Inputs | None = None
        self.task = -2
        self.touched = False
        self.listener: Callable[[], None] | None = None
        self.flags = numeric_flags()
        self.settings: _Settings = []
        self.sharded = False
        self.foreign = False
        self.defer: Callable[[RecomputeError], bool] | None = None
        for child in module.modules():
            buffers: dict[str, Any] = dict(child._buffers)
            for name, buffer in child._buffers.items():
                if buffer is None:
                    continue
                if is_small(buffer):
                    buffers[name] = buffer.detach().clone()  # distributed training writes it, and no version tells
                else:
                    self.versions.append((buffer, buffer._version, local(buffer).data_ptr(), False))
            plain = {name: value for name, value in child.__dict__.items() if isinstance(value, SCALARS)}
            self.settings += [(child._parameters, dict(child._parameters.items())), (child._buffers, buffers)]
            self.settings.append((child.__dict__, plain))
        for argument in (*args, *kwargs.values()):
            if plain := plain_attributes(argument):
                self.settings.append((argument.__dict__, plain))

    def unpack(self, handle: Handle) -> torch.Tensor:
        """The tensor behind a handle."""
        with self.lock, self._undisturbed():
            if not self.touched:
                self.touched = True
                if self.listener is not None:
                    self.listener()
                if self.inputs is not None:
                    self.inputs.look()
            if handle.tensor is not None:
                return kept(handle)
            task = torch._C._current_graph_task_id()
            if handle.index not in self.values:
                with default_generators:
                    self._run()
                if task != -1 and task != self.task:
                    self.task = task
                    passes.add(task, self)
            value = self.values.pop(handle.index)
            if task == -1:
                self.values.clear()
            self._check(handle.index, value)
            return value

    def _check(self, index: int, value: torch.Tensor) -> None:
        """The canary of rule 4."""
        value = local(value)
        seen = self.samples.compare(index, value) if self.samples is not None else None
        if seen is not None:
            passes.judge(seen, partial(self._differs, f"saved tensor {index} {list(value.shape)}"))

    def _differs(self, which: str, ulp: float) -> None:
        if ulp <= canary.FEW_ULP and not self.foreign:
            self._doubt(f"run again, a value differed by {ulp:.3g} ulp")
            return
        error = self._mismatch("it computed something else", which)
        if self.defer is None or not self.defer(error):
            raise error

    def end(self) -> None:
        """The backward pass is over."""
        with self.lock:
            self.values.clear()
            self.task = -2
            self.touched = False

    def _run(self) -> None:
        for tensor, version, place, is_saved in self.versions:
            sharded = self.sharded and isinstance(tensor, torch.nn.Parameter)
            if tensor._version != version or (
                place is not None and (place_of(local(tensor)) if sharded else local(tensor).data_ptr()) != place
            ):
                if not is_saved:
                    self._doubt(WRITTEN)
                raise ChangedTensorError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"an input, parameter or buffer of block `{self.block}` changed between forward and backward, and "
                    f"the block has to run again ([{tensor.type()} {list(tensor.shape)}] is at version "
                    f"{tensor._version}; expected version {version} instead)."
                )
        found: list[torch.Tensor] = []
        wanted, partitioned = len(self.metas), self.partitioned

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if partitioned and shown_by(tensor, partitioned) is not None:
                return tensor  # autograd has the parameter itself
            found.append(tensor.detach())
            if len(found) == wanted and not partitioned:  # what gathers in modules must see each of them end
                raise _AllPacked
            return tensor.detach()

        before = {device: generator_of(device).get_state() for device in self.states}
        for device, state in self.states.items():
            generator_of(device).set_state(state)
        replaying.active = True
        try:
            with (
                _restored(self.settings),
                staying(partitioned),
                set_numeric_flags(self.flags),
                torch.enable_grad(),
                self._undisturbed(),
                ExitStack() as casts,
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
                suppress(_AllPacked),
            ):
                for kind, dtype, cache in self.autocast:
                    casts.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=dtype is not None, cache_enabled=cache)
                    )
                self.module.forward(*self.args, **self.kwargs)
        finally:
            replaying.active = False
            for device, state in before.items():
                generator_of(device).set_state(state)
        for index, (tensor, meta) in enumerate(zip(found, self.metas, strict=False)):
            if canary.meta(tensor) != meta:
                raise self._mismatch(f"saved tensor {index} is {canary.meta(tensor)}, was {meta}")
        if len(found) != wanted:
            raise self._mismatch(f"{len(found)} saved tensors, were {wanted}")
        self.values = dict(enumerate(found))

    def _undisturbed(self) -> AbstractContextManager[Any]:
        """What Memfit does is nobody's business; but DTensors are made of dispatch."""
        return nullcontext() if self.foreign else torch._C._DisableTorchDispatch()

    def _doubt(self, why: str) -> None:
        # NOTE [Blocks that gather]: a block of DTensors calls collectives, and again when it runs again, as every rank
        # of its mesh does. So how it is run may depend on what all of them see, its program, and on nothing else.
        if self.distrust is not None and not self.foreign:
            self.distrust(why)

    def _mismatch(self, detail: str, which: str = "what it saved") -> RecomputeError:
        self._doubt("run again, it computed something else")
        return RecomputeError(
            self.block,
            which,
            "the whole block, run again",
            f"The second run differs: {detail}; the block depends on more than its arguments, parameters and torch's "
            "generators. Drop this step's gradients and step again: from now on it keeps what it saves.",
        )


@contextmanager
def _restored(settings: _Settings) -> Iterator[None]:
    """Have a module as it was, and leave it as it is: what a second run writes down is gone with it."""
    # By items: ZeRO-3's dictionaries of parameters gather what is taken out by name.
    before = [(dictionary, dict(dictionary.items())) for dictionary, _ in settings]
    for dictionary, then in settings:
        dictionary.update(then)
    try:
        yield
    finally:
        for dictionary, now in before:
            for name in dictionary.keys() - now.keys():
                del dictionary[name]
            dictionary.update(now)


class _AllPacked(Exception):
    """Everything that is needed has been packed: the rest of the forward need not run."""


class _Replaying(threading.local):
    """Whether this thread runs a fallback's forward again: blocks inside it are its own affair."""

    active = False


replaying = _Replaying()
