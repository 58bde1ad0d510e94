"""Blocks that run again as a whole, since recipes cannot make DTensors (design, rule 13): what they cost.

Such a block has two policies: it keeps what autograd saves, or its inputs. So its program is one op, which makes all
that is saved. What its backward allocates is not replayed from a tape, which collectives would break, but watched in
the rehearsed step itself.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import torch

from memfit.costs import nodes_of
from memfit.profiles import Node, OpCost, ProgramProfile, TimelineEvent
from memfit.programs import Leaf, Program
from memfit.sharding import local
from memfit.simulation.ledger import Ledger
from memfit.simulation.recording import FakeRecorder


class LocalRecorder(FakeRecorder):  # type: ignore[no-untyped-call]
    """Records what a block of DTensors does to the tensors that this device holds."""

    def __init__(self, leaves: list[tuple[Leaf, torch.Tensor]], ledger: Ledger) -> None:
        super().__init__([(leaf, local(tensor)) for leaf, tensor in leaves], ledger)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # what it does with its local tensors is seen
        return super().__torch_dispatch__(func, types, args, kwargs)

    def pack(self, tensor: torch.Tensor) -> None:
        """Autograd keeps ``tensor`` (already detached)."""
        super().pack(local(tensor))


class BackwardWatch:
    """A block's backward as it happens: see `TimelineEvent`.

    Attributes:
        events: So far.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.events: list[TimelineEvent] = []
        self._ledger = ledger
        self._sizes: dict[int, tuple[int, int]] = {}
        self._count = 0

    def begin(self) -> None:
        """The block's backward begins."""
        self._ledger.watcher = self

    def end(self) -> None:
        """The block's backward has ended."""
        if self._ledger.watcher is self:
            self._ledger.watcher = None

    def came(self, key: int, size: int) -> None:
        """A storage is there."""
        self._sizes[key] = self._count, size
        self.events.append(TimelineEvent(kind="alloc", index=self._count, size=size))
        self._count += 1

    def went(self, key: int) -> None:
        """A storage is gone."""
        if key in self._sizes:
            number, size = self._sizes.pop(key)
            self.events.append(TimelineEvent(kind="free", index=number, size=size))

    def unpacked(self, index: int) -> None:
        """Autograd asks for a saved tensor."""
        if self._ledger.watcher is self:
            self.events.append(TimelineEvent(kind="unpack", index=index))

    def released(self, index: int) -> None:
        """Autograd is done with a saved tensor."""
        if self._ledger.watcher is self:
            self.events.append(TimelineEvent(kind="release", index=index))


def whole_profile(
    program: Program,
    timeline: Sequence[TimelineEvent],
    *,
    backward_seconds: float,
    held: Set[int] = frozenset(),
    owned: Set[int] = frozenset(),
) -> ProgramProfile:
    """What a block costs that runs again as a whole or not at all.

    Args:
        program: Of its local tensors.
        timeline: Of its backward.
        backward_seconds: Of that.
        held, owned: As `profile_program` has them.
    """
    nodes = nodes_of(program, held=held, owned=owned, demoted=frozenset())
    saved = [each.value.node for each in program.saved]
    returned = [value.node for value in program.outputs]
    kept = [n for n, node in enumerate(nodes) if node.kind != "computed" or n in saved or n in returned]
    place = {number: index for index, number in enumerate(kept)}
    chosen = [_node(nodes[number]) for number in kept]
    # What is saved is there together when the second run ends; what else is there meanwhile is gone by then.
    entering = {program.nodes[n].storage: nodes[n].storage_bytes for n in kept if nodes[n].kind == "input"}
    made = {program.nodes[n].storage: nodes[n].storage_bytes for n in kept if nodes[n].kind == "computed"}
    more = max(0, program.peak_bytes - sum(entering.values()) - sum(made.values()))
    run = OpCost(
        name="the whole block",
        seconds=program.forward_seconds,
        inputs=tuple(i for i, node in enumerate(chosen) if node.kind == "input"),
        outputs=(*(i for i, node in enumerate(chosen) if node.kind == "computed"), len(chosen)),
    )
    return ProgramProfile(
        key=program.key,
        nodes=(*chosen, Node(storage_bytes=more, producer=0)),
        ops=(run,),
        saved=tuple(place[number] for number in saved),
        outputs=tuple(dict.fromkeys(place[number] for number in returned)),
        timeline=tuple(timeline),
        forward_seconds=program.forward_seconds,
        backward_seconds=backward_seconds,
        forward_bytes=program.peak_bytes,
    )


def _node(node: Node) -> Node:
    if node.kind != "computed":
        return node
    return replace(node, producer=0, narrow_bytes=None, narrow_seconds=0.0, must_keep=False)


__all__ = ["BackwardWatch", "LocalRecorder", "whole_profile"]
