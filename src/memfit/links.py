"""Links between block calls: the input of a block may be dropped where the block before can bring it back.

What call j-1 returned is offered to the next call. If the very tensor, at the version that it was returned with, enters
call j as an argument (design, rule 15), j may drop it: its handles then hold what the recipe of that output reads, and
so on through j-1's own dropped input. They hold it as they hold the leaves of their own recipes, so memory is freed
with the autograd graph. On any break between the two (another object, ``h += 1``, a call that kept everything) j keeps
its input. Both are on one device and one stream: a `Runtime` has no calls elsewhere.

Bringing an input back runs one call's recipe after another, from the first that starts at something kept. Nothing that
is made on the way stays, so what that needs is the most that any one of them needs; the input itself is cached in j's
frame until its last use there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from memfit.canary import all_bits, same_bits
from memfit.errors import ChangedTensorError
from memfit.inputs import counter_of
from memfit.plans import Policy
from memfit.profiles import Link
from memfit.programs import Program, Value
from memfit.replay import run_ops
from memfit.signature import numeric_flags, set_numeric_flags, tensors_in
from memfit.solver.links import kept_input
from memfit.steps import Environment, view_of

if TYPE_CHECKING:
    from memfit.blocks import Block
    from memfit.calls import Call
    from memfit.entries import ProgramState
    from memfit.frames import Cell, Frame

Choose = Callable[["ProgramState", int, str], Policy | None]
CHECKED_OFFERS = 3
"""After a recording, and so often at first, all bits of what a block returned are compared when the next one begins."""
_GIVEN = -1
"""Where an environment holds what one call hands to the next."""


class Upstream:
    """Brings back what a call returned. Held by the handles of the call that it entered, and by nothing else."""

    __slots__ = ("bits", "cells", "counter", "frame", "pointer", "source", "tensor", "value", "version", "written")

    def __init__(
        self,
        tensor: torch.Tensor,
        value: Value,
        frame: Frame,
        cells: tuple[Cell, ...],
        source: Upstream | None,
        bits: torch.Tensor | None,
        written: Callable[[], None],
    ) -> None:
        """An output of a call.

        Args:
            tensor: It, as it was returned.
            value: The view of a node that it is.
            frame: Of the call that returned it.
            cells: What the recipe of the output reads.
            source: Brings back that call's own input, if the recipe reads it and the call dropped it.
            bits: All bits of it, if they are to be compared where it is taken as it is.
            written: Called where they differ.
        """
        self.bits = bits
        self.written = written
        self.frame = frame
        self.cells = cells
        self.source = source
        self.value = value
        self.tensor = weakref.ref(tensor)
        self.pointer = tensor.data_ptr()
        self.counter = counter_of(tensor)
        self.version: int = tensor._version

    def restore(self) -> torch.Tensor:
        """The tensor, as it was when it was returned. Iterative: a row of links may be long (rule 14)."""
        row: list[Upstream] = []
        upstream: Upstream | None = self
        env: Environment = {}
        while upstream is not None:
            there = upstream._there()
            if there is not None:
                env[_GIVEN] = there
                break
            row.append(upstream)
            upstream = upstream.source
        while row:
            env = row.pop()._run(env)
        return env[_GIVEN]

    def _there(self) -> torch.Tensor | None:
        """The tensor itself, where something else keeps it."""
        tensor = self.tensor()
        if tensor is None or not _same_version(tensor, self.version) or tensor.data_ptr() != self.pointer:
            return None
        return None if self._is_written(tensor) else tensor.detach()

    def _is_written(self, tensor: torch.Tensor) -> bool:
        """Whether it was, past its version counter; then that is also said."""
        if self.bits is None or same_bits(tensor.detach(), self.bits):
            return False
        self.written()
        return True

    def _run(self, env: Environment) -> Environment:
        frame = self.frame
        compiled = frame.compiled
        recipe = compiled.returned
        assert recipe is not None
        if recipe.reads_link:
            assert compiled.policy.linked is not None
            env[compiled.policy.linked] = env.pop(_GIVEN)
        leaves = [(node, frame._checked(node, tensor, version)) for node, tensor, version in self.cells]
        frame._add_parameters(recipe.parameters, leaves)
        env.update(leaves)
        del leaves  # from here on each is freed at its last use
        return {_GIVEN: run_output(frame, env, self.value)}

    def check(self, block: str) -> None:
        """Refuse what plain autograd would refuse: a saved input that was written since.

        What comes back is right all the same; but a plain step would have raised, and silence hides a mistake. Where no
        version counts the write, a plain step goes on with what it finds: that is not here.
        """
        if not _same_version(self.counter, self.version):
            raise ChangedTensorError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"the input of block `{block}` ([{self.counter.type()} {list(self.value.size)}]) is at version "
                f"{self.counter._version}; expected version {self.version} instead. Write out of place."
            )
        tensor = self.tensor()
        if tensor is not None and self._is_written(tensor):
            raise ChangedTensorError(
                f"The input of block `{block}` ([{self.counter.type()} {list(self.value.size)}]) was written after the "
                "block had run, and no version counts that (`.data`). Write out of place, or step again."
            )


def run_output(frame: Frame, env: Environment, value: Value) -> torch.Tensor:
    """Run the recipe of an output from what it reads, which goes at its last use; the view ``value`` of it."""
    compiled = frame.compiled
    recipe = compiled.returned
    assert recipe is not None
    uses = list(recipe.uses)
    if frame.flags == numeric_flags():
        run_ops(compiled, recipe.closure, env, uses, frame.states)
    else:
        with set_numeric_flags(frame.flags):
            run_ops(compiled, recipe.closure, env, uses, frame.states)
    return view_of(env[recipe.node], value, compiled.bases[recipe.node])


class Offer:
    """What one call returned, until the next begins. Holds what recipes read no longer than an output lives."""

    __slots__ = ("__weakref__", "bits", "calls", "cells", "frame", "index", "outputs", "program", "source")

    def __init__(self, call: Call, outputs: list[torch.Tensor], calls: list[Call], *, checked: bool) -> None:
        """What ``call`` returned, as one of ``calls``, those of the step; all bits of it if it is to be ``checked``."""
        assert call.compiled is not None
        self.calls = calls
        self.index = call.index
        self.program: Program = call.compiled.program
        self.frame: Any = call.kept_frame if call.upstream is not None else None
        self.cells = call.upstream
        self.source = call.link
        me = weakref.ref(self)

        def withdraw(_: object) -> None:
            offer = me()
            if offer is not None and all(ref() is None for ref, _ in offer.outputs):
                offer.frame = offer.cells = offer.source = None

        self.outputs = [(weakref.ref(tensor, withdraw), tensor._version) for tensor in outputs]
        self.bits = [all_bits(tensor.detach()) for tensor in outputs] if checked else []

    def enters(self, tensors: list[torch.Tensor]) -> tuple[int, int] | None:
        """Which argument is which output, unchanged; the largest, if several are."""
        found = None
        size = 0
        for argument, tensor in enumerate(tensors):
            for output, (ref, version) in enumerate(self.outputs):
                if ref() is tensor and _same_version(tensor, version) and tensor.numel() > size:
                    if any(tensor is other for other in tensors[:argument]):
                        continue
                    found, size = (argument, output), tensor.numel()
        return found

    def is_written(self, output: int, tensor: torch.Tensor) -> bool:
        """Whether ``tensor``, of the version that was returned, holds something else (``h.data += 1``)."""
        return bool(self.bits) and not same_bits(tensor.detach(), self.bits[output])


class Tie:
    """One call's argument is an output of the call before it.

    Attributes:
        argument: Its index among the tensors that the call was given.
        output: Its index among those that the call before returned.
        link: The two as nodes, once both programs are known and such a link could be used.
        holders: Where the call holds the tensor, if somebody wants to know.
    """

    __slots__ = ("argument", "holders", "link", "offer", "output")

    def __init__(self, argument: int, output: int, offer: Offer) -> None:
        self.argument = argument
        self.output = output
        self.offer: Offer | None = offer
        self.link: Link | None = None
        self.holders: list[weakref.ref[torch.Tensor]] = []


class Links:
    """The offers between the calls of one runtime, one for each thread."""

    def __init__(self, note: Callable[[str, str], None], written: Callable[[Block, int], None]) -> None:
        """None yet; ``note`` takes what the report should say, ``written`` which argument the model wrote."""
        self._written = written
        self.used = False
        self._note = note
        self._local = threading.local()

    def leave(self, call: Call, output: Any, calls: list[Call], *, watched: bool) -> None:
        """A call ends; if ``watched``, somebody will ask for its `Tie`."""
        if call.mode != "replay" or not (watched or call.upstream is not None):
            return
        if call.tie is not None and watched:
            call.tie.link = _linked_nodes(call)
            call.tie.holders = _holders(call)
        if not call.block.sharded:
            self.used = True
            call.block.offers += 1
            checked = call.fresh or call.block.offers <= CHECKED_OFFERS
            self._local.offer = Offer(call, tensors_in(output), calls, checked=checked)

    def enter(self, call: Call, calls: list[Call]) -> None:
        """A call begins: is one of its arguments what the call before it returned?"""
        if not self.used:
            return
        offer, self._local.offer = getattr(self._local, "offer", None), None
        if offer is None or offer.calls is not calls or offer.index != call.index - 1 or call.block.unlinked:
            return
        found = offer.enters(call.tensors)
        if found is None:
            return
        if offer.is_written(found[1], call.tensors[found[0]]):
            self._unlink(call.block)
        else:
            call.tie = Tie(found[0], found[1], offer)

    def failed(self, block: Block) -> None:
        """What came back through the input of ``block`` was wrong: the second time, it is kept from then on."""
        block.link_failures += 1
        if block.link_failures > 1:
            self._unlink(block)

    def _unlink(self, block: Block) -> None:
        block.unlinked = True
        self._note(
            "unlinked",
            f"`{block.name}` keeps its input, as does every block for which this holds: what the one before returned "
            "is written on the way, and no version counts that (`.data`)",
        )

    def accept(self, call: Call, state: ProgramState, choose: Choose, calls: list[Call]) -> Policy | None:
        """The policy for a call: as chosen if its dropped input can come back, else with that input kept."""
        self.enter(call, calls)
        policy = choose(state, call.index, call.block.name)
        if policy is None or policy.linked is None:
            return policy
        return _linked(call, state.program, policy, self._written)


def _linked(call: Call, program: Program, policy: Policy, written: Callable[[Block, int], None]) -> Policy:
    """The policy, and its way back to the input in ``call.link``; or that input kept."""
    assert policy.linked is not None
    tie = call.tie
    offer = tie.offer if tie is not None else None
    if tie is None or offer is None or offer.frame is None or offer.cells is None:
        return kept_input(policy)
    recipe = offer.frame.compiled.returned
    value = offer.program.outputs[tie.output]
    if recipe is None or recipe.node != value.node or input_node(program, tie.argument) != policy.linked:
        return kept_input(policy)
    source = offer.source if recipe.reads_link else None
    bits = offer.bits[tie.output] if offer.bits else None
    seen = partial(written, call.block, tie.argument)
    call.link = Upstream(call.tensors[tie.argument], value, offer.frame, offer.cells, source, bits, seen)
    return policy


def input_node(program: Program, argument: int) -> int | None:
    """The node of a program that is its ``argument``-th tensor, if recipes may start from it."""
    for number, node in enumerate(program.nodes):
        if node.leaf is not None and node.leaf.kind == "input" and node.leaf.index == argument:
            return None if node.custom else number
    return None


def is_held_elsewhere(holders: list[weakref.ref[torch.Tensor]]) -> bool:
    """Whether somebody beside ``holders`` keeps the storage of what they hold alive: dropping it would free nothing."""
    alive = {id(tensor): tensor for ref in holders if (tensor := ref()) is not None}
    if not alive:
        return False
    storage = next(iter(alive.values())).untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) > len(alive) + 1  # the one is `storage`


def _linked_nodes(call: Call) -> Link | None:
    tie = call.tie
    assert tie is not None
    assert call.compiled is not None
    if tie.offer is None:
        return None
    return link_of(tie.offer.program, tie.output, call.compiled.program, tie.argument)


def link_of(before: Program, output: int, program: Program, argument: int) -> Link | None:
    """The link of a call whose ``argument``-th tensor is the ``output``-th that the call before returned.

    Returns:
        ``None`` where a recipe cannot start from the one, or end in the other.
    """
    linked = input_node(program, argument)
    node = before.outputs[output].node
    if linked is None or (before.nodes[node].leaf is None and not before.nodes[node].recomputable):
        return None
    return Link(input=linked, output=node)


def _holders(call: Call) -> list[weakref.ref[torch.Tensor]]:
    assert call.tie is not None
    storage = call.tensors[call.tie.argument].untyped_storage()._cdata
    found: dict[int, torch.Tensor] = {}
    for handle in call.handles:
        for tensor in (handle.tensor, *(tensor for _, tensor, _ in handle.leaves)):
            if tensor is not None and tensor.untyped_storage()._cdata == storage:
                found[id(tensor)] = tensor
    return [weakref.ref(tensor) for tensor in found.values()]


def _same_version(tensor: torch.Tensor, version: int) -> bool:
    """Rule 15: the same object may have been written since (``h += 1``)."""
    return tensor._version == version
