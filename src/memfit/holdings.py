"""What the memory of a process consists of at one moment of training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from memfit.sharding import local
from memfit.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Bytes on the model's device, by part.

    Attributes:
        held_bytes: By the whole process.
        weight_bytes: Parameters and buffers of the fitted model.
        gradient_bytes: Its gradients.
        state_bytes: The state of its optimizers.
        saved_bytes: What its blocks keep for the backward, as their recordings say.
    """

    held_bytes: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    saved_bytes: int = 0

    @property
    def static_bytes(self) -> int:
        """What no plan can lower."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes

    @property
    def other_bytes(self) -> int:
        """The process itself, inputs, and what lies outside the blocks."""
        return max(0, self.held_bytes - self.static_bytes - self.saved_bytes)

    def sentence(self) -> str:
        """All parts; they add up to what is held."""
        parts = [
            ("weights", self.weight_bytes),
            ("gradients", self.gradient_bytes),
            ("optimizer state", self.state_bytes),
            ("saved by blocks", self.saved_bytes),
            ("everything else", self.other_bytes),
        ]
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts)


def weight_bytes(model: torch.nn.Module, device: torch.device | None = None) -> int:
    """Parameters and buffers, tied ones and views of one storage once; of several devices those on one."""
    tensors = [*model.parameters(), *model.buffers()]
    return _storage_bytes(tensor for tensor in tensors if device is None or tensor.device == device)


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages: dict[int, int] = {}
    for tensor in map(local, tensors):
        try:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        except (NotImplementedError, RuntimeError):  # sparse, or a subclass without a storage
            storages[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(storages.values())
