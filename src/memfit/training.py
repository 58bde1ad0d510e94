"""What training adds to a model: its gradients, and the optimizers' state."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from memfit.partitioned import engine_around, stepping
from memfit.sharding import local, owned_parameters

STATE_FACTORS = {"adamw": 2.0, "adam": 2.0, "sgd": 0.0, "adagrad": 1.0, "rmsprop": 1.0, "lion": 1.0, "adafactor": 0.1}
"""Optimizer state per trainable parameter byte, reserved until the first `optimizer.step()`."""


class TrainingState:
    """Reads what gradients and optimizer state take."""

    def __init__(self, model: torch.nn.Module, optimizer: Any, device: torch.device, *, alone: bool = True) -> None:
        """Of ``model`` on ``device``, its only one if ``alone``; ``optimizer`` is what the user named, or ``None``."""
        self.born = False  # whether an optimizer has stepped
        self._device = device
        self._alone = alone
        self._named = optimizer
        self._model = weakref.ref(model)
        # Weak: sharding puts others into the model, and the whole ones are to go then.
        self._parameters: list[weakref.ref[torch.nn.Parameter]] = []
        self._identities: set[int] = set()
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._own: dict[int, bool] = {}
        self._engine: Any = None
        self._engine_steps = -1  # of DeepSpeed's, that have been counted
        self.look()

    def look(self) -> None:
        """Which parameters train now: sharding, or adapters, may have put others into the model."""
        model = self._model()
        if model is None:
            return
        self._engine = engine_around(model) or self._engine
        if (stepped := stepping(self._engine)) is not None and stepped.state:
            self._optimizers.add(stepped)  # DeepSpeed makes its state before the first step
            self.born = True
        trainable = [
            p for p in owned_parameters(model) if p.requires_grad and (self._alone or p.device == self._device)
        ]
        if self._parameters and not all(p.is_leaf for p in trainable):
            return  # `functional_call` has put what it was given in their places, for this forward
        identities = {id(p) for p in trainable}
        if identities != self._identities or len(self._trainable) < len(self._parameters):
            self._parameters, self._identities = [weakref.ref(p) for p in trainable], identities
            self._own.clear()

    @property
    def _trainable(self) -> list[torch.nn.Parameter]:
        return [parameter for reference in self._parameters if (parameter := reference()) is not None]

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped: its state is there."""
        self._optimizers.add(optimizer)
        self.born = True
        self._engine_steps = getattr(self._engine, "global_steps", -1)

    def gradient_bytes(self) -> int:
        """What gradients take now."""
        grads = [local(p.grad) for p in self._trainable if p.grad is not None]
        return sum(min(g.nbytes, g.untyped_storage().nbytes()) for g in grads)  # they may be views of one large bucket

    def state_bytes(self) -> int:
        """What the optimizers that have stepped hold on the device."""
        total = 0
        seen: set[int] = set()
        for optimizer in self._optimizers:
            for values in optimizer.state.values():
                for value in values.values() if isinstance(values, dict) else ():
                    if isinstance(value, torch.Tensor) and self._is_here(value):
                        storage = local(value).untyped_storage()
                        if storage._cdata not in seen:
                            seen.add(storage._cdata)
                            total += storage.nbytes()
        return total

    def _is_here(self, value: torch.Tensor) -> bool:
        return value.device.type == self._device.type if self._alone else value.device == self._device

    def reserved_bytes(self) -> int:
        """Optimizer state before the first step: of the optimizer that was named, else AdamW's."""
        engines = stepping(self._engine)
        optimizer = engines if self._named is None and engines is not None else self._named
        name = "adamw" if optimizer is None else optimizer if isinstance(optimizer, str) else type(optimizer).__name__
        factor = STATE_FACTORS.get(name.lower(), 2.0)
        if isinstance(optimizer, torch.optim.SGD) and any(g.get("momentum") for g in optimizer.param_groups):
            factor = 1.0
        if engines is not None:  # of this rank's part, in full precision
            return int(factor * sum(p.nbytes for group in engines.param_groups for p in group["params"]))
        return int(factor * sum(local(p).numel() * p.element_size() for p in self._trainable))

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer steps any of the parameters; one that DeepSpeed calls for each of its groups, once."""
        if self._engine is not None and optimizer is stepping(self._engine):
            return bool(self._engine.global_steps != self._engine_steps)
        known = self._own.get(id(optimizer))
        if known is None:
            known = any(id(p) in self._identities for group in optimizer.param_groups for p in group["params"])
            self._own[id(optimizer)] = known
        return known
