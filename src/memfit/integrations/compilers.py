"""`torch_compile=True` of a Trainer: the model is compiled in place, before it is fitted.

accelerate would compile it when it prepares it, into a wrapper, after it was fitted; nothing could be planned then.
Compiled in place, with the same options, the plan is handed to the compiler (see `handover`).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class CompiledInPlace:
    """The model of a Trainer that was told to compile it, until `restore`; of others nothing is changed."""

    def __init__(self, model: torch.nn.Module, trainer: Any, *, decided: bool) -> None:
        """Compile it, and have accelerate leave it alone, where a plan can be handed over.

        That is where options of `fit` have ``decided`` that there will be one, and in one process.
        """
        self._plugin: Any = None
        self._model: weakref.ref[torch.nn.Module] | None = None
        self.notes: list[str] = []
        state = getattr(getattr(trainer, "accelerator", None), "state", None)
        plugin = getattr(state, "dynamo_plugin", None)
        backend: Any = getattr(plugin, "backend", None)
        if not decided or getattr(backend, "value", "NO") == "NO" or getattr(plugin, "use_regional_compilation", False):
            return
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            return
        assert plugin is not None
        if getattr(model, "_compiled_call_impl", None) is None:
            model.compile(**plugin.to_kwargs())
            self._model = weakref.ref(model)
        self._plugin, self._backend = plugin, backend
        plugin.backend = type(backend)("NO")
        self.notes.append("`torch_compile=True` was taken over: the model is compiled in place, with the plan")

    def restore(self, *, model: bool = True) -> None:
        """accelerate compiles again; and with ``model`` the model is no longer compiled."""
        if self._plugin is not None:
            self._plugin.backend, self._plugin = self._backend, None
        compiled = self._model() if self._model is not None and model else None
        if compiled is not None:
            compiled._compiled_call_impl = None
            self._model = None
