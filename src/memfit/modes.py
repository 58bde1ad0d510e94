"""Switches of a model that training under Memfit holds still."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from memfit.takeover import Takeover


class Modes:
    """``use_cache``, and the model's own checkpointing, DeepSpeed's too."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._notes: list[str] = []
        self._takeover = Takeover(model)
        self._configs: list[Any] = list(
            {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")}.values()
        )
        self._switched = [
            weakref.ref(m)
            for m in model.modules()
            if isinstance(getattr(m, "gradient_checkpointing", None), bool | str)
        ]
        self._taken: list[tuple[weakref.ref[torch.nn.Module], Any]] = []
        self._caches: list[tuple[Any, Any]] = []

    @property
    def notes(self) -> list[str]:
        """What was taken over."""
        return [*self._notes, *self._takeover.notes()]

    def enter(self) -> None:
        """A training forward begins."""
        self._takeover.enter()
        for reference in self._switched:
            module: Any = reference()
            if module is not None and module.gradient_checkpointing:
                self._taken.append((reference, module.gradient_checkpointing))  # Unsloth's is a word
                module.gradient_checkpointing = False
                note = "the model's own gradient checkpointing was taken over: the plan decides instead"
                if note not in self._notes:
                    self._notes.append(note)
        for config in self._configs:
            if config.use_cache:
                self._caches.append((config, config.use_cache))
                config.use_cache = False

    def leave(self) -> None:
        """It is over."""
        self._takeover.leave()
        while self._caches:
            config, value = self._caches.pop()
            config.use_cache = value

    def restore(self) -> None:
        """As the user had it."""
        self.leave()
        for reference, value in self._taken:
            module: Any = reference()
            if module is not None:
                module.gradient_checkpointing = value
        self._taken = []
