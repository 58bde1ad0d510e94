"""Dropped storages that somebody else keeps alive: dropping them frees nothing (design, rule 18).

A hook that captures attention maps, a cache of the model's, a list of hidden states: what they hold is there in the
backward whatever a plan says. Seen by weak references, when the backward of a call begins.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.multiprocessing.reductions import StorageWeakRef

from memfit.entries import ProgramState
from memfit.frames import Handle
from memfit.replay import RECOMPUTE, CompiledPolicy


class Holders:
    """Weak references to what one call is about to drop."""

    __slots__ = ("_state", "_storages")

    def __init__(self, state: ProgramState, compiled: CompiledPolicy, handles: Iterable[Handle]) -> None:
        """Of storages that the block makes, does not return, and shows by dropped tensors only."""
        nodes = compiled.program.nodes
        taken = {node.storage for node in nodes if node.output or node.leaf is not None}
        taken |= {
            nodes[saved.value.node].storage
            for saved, action in zip(compiled.program.saved, compiled.actions, strict=True)
            if action != RECOMPUTE
        }
        self._state = state
        self._storages: dict[int, StorageWeakRef] = {}
        for handle in handles:
            number = compiled.program.saved[handle.index].value.node
            if nodes[number].storage not in taken and handle.tensor is not None:
                storage = handle.tensor.untyped_storage()
                self._storages[number] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def look(self) -> None:
        """Tell the program which of them are still alive."""
        alive = {n for n, weak in self._storages.items() if not weak.expired()}  # type: ignore[no-untyped-call]
        self._state.saw_held(alive, freed=self._storages.keys() - alive)
