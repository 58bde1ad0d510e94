"""Frames: what one block call left behind for its backward.

Autograd holds a `Handle` for every tensor that it packed. A handle of a kept value owns its tensor; a handle of a
dropped value owns the tensors that its recipe reads, so that memory is freed as autograd frees its nodes, whatever the
order, and nothing is counted (design, rule 18). References run from handle to frame and never back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from memfit import canary
from memfit.errors import ChangedTensorError, RecomputeError
from memfit.narrowing import widen
from memfit.passes import passes
from memfit.replay import NARROW, CompiledPolicy, Restorer, States
from memfit.sharding import place_of
from memfit.signature import set_numeric_flags
from memfit.steps import Environment, view_of

if TYPE_CHECKING:
    from memfit.fallback import ReplayOfModule
    from memfit.holders import Holders
    from memfit.inputs import Inputs
    from memfit.links import Upstream
    from memfit.resets import Resets

Cell = tuple[int, torch.Tensor, int]
"""A leaf of a recipe: node, tensor, and the version that it must still have."""


class Handle:
    """What autograd keeps instead of a tensor. Copies and pickles without its tensor: inert."""

    __slots__ = ("frame", "index", "leaves", "link", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, index: int) -> None:
        """Own ``tensor``, the ``index``-th that this call packed, as it is at this moment."""
        self.tensor: torch.Tensor | None = tensor
        self.index = index
        self.version: int = tensor._version
        self.frame: Frame | ReplayOfModule | Kept | None = None
        self.leaves: tuple[Cell, ...] = ()
        self.link: Upstream | None = None

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _inert_handle, ()


def _inert_handle() -> Handle:
    return Handle(torch.empty(0), -1)


def unpack(handle: Handle) -> torch.Tensor:
    """The unpack hook of every fitted block."""
    frame = handle.frame
    if frame is not None:
        return frame.unpack(handle)
    tensor = handle.tensor
    if tensor is not None and tensor._version == handle.version:
        return tensor
    return kept(handle)


def kept(handle: Handle) -> torch.Tensor:
    """The tensor of a kept handle, if it is still what was saved. See NOTE [Version counters]."""
    # NOTE [Version counters]: where hooks are installed, autograd does not compare versions itself. Without this check
    # a tensor that plain autograd would refuse is returned silently.
    tensor = handle.tensor
    assert tensor is not None
    if tensor._version != handle.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version "
            f"{handle.version} instead."
        )
    return tensor


class Kept:
    """Stands behind the first handle of a call that keeps everything, so that its backward is noticed."""

    __slots__ = ("__weakref__", "listener")

    def __init__(self) -> None:
        """Nothing is listening yet."""
        self.listener: Callable[[], None] | None = None

    def unpack(self, handle: Handle) -> torch.Tensor:
        """The kept tensor."""
        listener, self.listener = self.listener, None
        if listener is not None:
            listener()
        return kept(handle)


class Frame:
    """Replays the dropped values of one block call."""

    __slots__ = (
        "__weakref__",
        "block",
        "compiled",
        "defer",
        "demote",
        "distrust",
        "flags",
        "holders",
        "inputs",
        "link_failed",
        "listener",
        "lock",
        "parameters",
        "resets",
        "restorer",
        "samples",
        "sharded",
        "states",
        "task",
        "touched",
        "written",
    )

    def __init__(self, block: str, compiled: CompiledPolicy) -> None:
        """A frame of block ``block`` under a policy."""
        self.block = block
        self.compiled = compiled
        self.lock = threading.RLock()
        self.task = -2
        self.touched = False
        self.restorer: Restorer | None = None
        self.states: States | None = None
        self.parameters: dict[int, tuple[torch.Tensor, int, int]] = {}
        self.resets: Resets | None = None
        self.samples: canary.Samples | None = None
        self.holders: Holders | None = None
        self.flags: tuple[Any, ...] = ()
        self.sharded = False
        self.listener: Callable[[], None] | None = None
        self.defer: Callable[[RecomputeError], bool] | None = None
        self.demote: Callable[[int, float], None] | None = None
        self.distrust: Callable[[], None] | None = None
        self.link_failed: Callable[[], None] | None = None
        self.inputs: Inputs | None = None
        self.written: Callable[[int], None] | None = None

    def unpack(self, handle: Handle) -> torch.Tensor:
        """The tensor behind a handle: as kept, widened, or brought back by its recipe."""
        if torch._C._len_torch_dispatch_stack():
            with torch._C._DisableTorchDispatch():  # what Memfit does is nobody's business
                return self._unpack(handle)
        return self._unpack(handle)

    def _unpack(self, handle: Handle) -> torch.Tensor:
        with self.lock:
            if not self.touched:
                self.touched = True
                if self.listener is not None:
                    self.listener()
                if self.holders is not None:
                    self.holders.look()
                    self.holders = None
                if self.inputs is not None:
                    self.inputs.look()
            if handle.tensor is not None:
                return self._kept(handle)
            restorer = self._restorer()
            value = restorer.take(handle.index)
            if value is None:
                value = self._restore(restorer, handle)
            self._check(handle, value)
            return value

    def _restorer(self) -> Restorer:
        """Of the backward pass that runs; of nobody else, where somebody only looks at a graph."""
        task = torch._C._current_graph_task_id()
        restorer = self.restorer
        if task != self.task or restorer is None:
            restorer = self._begin(task)
        return restorer

    def _restore(self, restorer: Restorer, handle: Handle) -> torch.Tensor:
        """Run the recipe of a handle."""
        if handle.link is not None:
            self._bring_input(handle.index, handle.link, restorer)
        env = restorer.env
        leaves = [(node, self._checked(node, tensor, version, env)) for node, tensor, version in handle.leaves]
        self._add_parameters(self.compiled.parameters[handle.index], leaves)
        if restorer.same_flags:
            return restorer.restore(handle.index, leaves)
        with set_numeric_flags(self.flags):
            return restorer.restore(handle.index, leaves)

    def _kept(self, handle: Handle) -> torch.Tensor:
        tensor = kept(handle)
        compiled = self.compiled
        node = compiled.program.saved[handle.index].value.node
        if compiled.actions[handle.index] == NARROW:
            return self._widened(handle.index, node, tensor)
        if compiled.program.nodes[node].custom:
            return tensor.clone()  # a custom Function may overwrite what it saved (rule 7)
        return tensor

    def _widened(self, index: int, node: int, tensor: torch.Tensor) -> torch.Tensor:
        """A narrowed saved tensor as it was; where something else reads it in this pass, both get the same one."""
        compiled = self.compiled
        value = compiled.program.saved[index].value
        if compiled.program.nodes[node].custom or compiled.uses[node] == 1:
            return view_of(widen(tensor, value.dtype, compiled.narrowed[node]), value, compiled.bases[node])
        restorer = self._restorer()
        found = restorer.take(index)
        if found is None:
            restorer.env[node] = widen(tensor, value.dtype, compiled.narrowed[node])
            found = restorer.take(index)
            assert found is not None
        return found

    def _begin(self, task: int) -> Restorer:
        """The first value to be brought back in this backward pass; outside one nothing is kept."""
        restorer = Restorer(self.compiled, self.states)
        restorer.same_flags = self.flags == passes.flags(task)
        if task != -1:
            self.task, self.restorer = task, restorer
            passes.add(task, self)
        return restorer

    def end(self) -> None:
        """The backward pass is over: what recipes cached is freed."""
        with self.lock:
            self.restorer = None
            self.task = -2
            self.touched = False

    def _checked(self, node: int, tensor: torch.Tensor, version: int, env: Environment | None = None) -> torch.Tensor:
        """A leaf of a recipe as it was; a narrowed one as wide as it was, from ``env`` if it is there."""
        if tensor._version != version:
            leaf = self.compiled.program.nodes[node].leaf
            if leaf is not None and self.written is not None and all(v.node != node for v in self.compiled.values):
                self.written(leaf.index)  # plain autograd keeps no such input: from now on, nor do we need it
            where = "an input" if leaf is not None else "a saved value"
            raise ChangedTensorError(
                f"one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{where} of block `{self.block}` that a recipe reads ([{tensor.type()} {list(tensor.shape)}]) is at "
                f"version {tensor._version}; expected version {version} instead. Write out of place, or step again."
            )
        narrow = self.compiled.narrowed.get(node)
        if narrow is None:
            return tensor
        wide = env.get(node) if env is not None else None
        return widen(tensor, self.compiled.bases[node].dtype, narrow) if wide is None else wide

    def _bring_input(self, index: int, link: Upstream, restorer: Restorer) -> None:
        """Have the linked input there, if what follows reads it."""
        node = self.compiled.policy.linked
        assert node is not None
        if restorer.wants(index, node):
            if any(value.node == node for value in self.compiled.values):
                link.check(self.block)
            restorer.env[node] = link.restore()

    def _add_parameters(self, nodes: tuple[int, ...], leaves: list[tuple[int, torch.Tensor]]) -> None:
        for node in nodes:
            tensor, place, version = self.parameters[node]
            now = self.resets.version(tensor) if self.resets else tensor._version
            if now != version or (place_of(tensor) if self.sharded else tensor.data_ptr()) != place:
                leaf = self.compiled.program.nodes[node].leaf
                name = f"{self.block}.{leaf.owner}.{leaf.name}".replace("..", ".") if leaf is not None else self.block
                how = f"is at version {now}, was {version}" if now != version else "has other data"
                if self.sharded and not place_of(tensor):
                    how = "is not gathered"
                raise ChangedTensorError(
                    f"one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"`{name}` changed between forward and backward ({how}), and a recipe of block `{self.block}` "
                    "reads it. Run the backward before changing weights."
                )
            leaves.append((node, tensor))

    def _check(self, handle: Handle, value: torch.Tensor) -> None:
        """The canary of rule 4."""
        seen = self.samples.compare(handle.index, value) if self.samples is not None else None
        if seen is not None:
            passes.judge(seen, partial(self._differs, handle.index, (self, *linked_frames(handle.link))))

    def _differs(self, index: int, involved: tuple[Frame, ...], ulp: float) -> None:
        program = self.compiled.program
        value = program.saved[index].value
        recipe = " -> ".join(str(program.ops[i].func).removeprefix("aten.") for i in self.compiled.closures[index])
        if ulp <= canary.FEW_ULP and self.demote is not None:
            self.demote(value.node, ulp)
            return
        for frame in involved:
            if frame.distrust is not None:
                frame.distrust()
        for frame in involved[:-1]:  # the last one did not read its input through a link
            if frame.link_failed is not None:
                frame.link_failed()
        error = RecomputeError(
            self.block,
            f"saved tensor {index} {list(value.size)}",
            recipe or "the block's input",
            "The recomputed value is not what the forward saved: something outside the block's arguments, parameters "
            "and attributes changed what it computes. Drop this step's gradients and step again: the block is recorded "
            "anew. If that comes back, exclude the block with `blocks=`, or make the change an argument or attribute.",
        )
        if self.defer is None or not self.defer(error):
            raise error


def linked_frames(link: Upstream | None) -> list[Frame]:
    """Of the calls that brought a linked input back, from the last to the first."""
    found: list[Frame] = []
    while link is not None:
        found.append(link.frame)
        link = link.source
    return found
