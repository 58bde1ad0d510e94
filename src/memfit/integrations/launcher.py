"""Find the model that an unmodified script trains, and fit it.

Three catches, each installed when the script imports what it hangs on; nothing is imported on our account:

1. `transformers.Trainer`: its model, when the training loop is entered. The model is then still itself, before
   accelerate wraps, shards or compiles it.
2. `gradient_checkpointing_enable` and `activation_checkpointing_enable` of a Hugging Face model: what is asked for is
   taken over. The model is fitted at its first training forward, not in the call: LoRA, freezing and the move to the
   device usually come after it.
3. Otherwise the first module that is called from outside any other module, in training mode, with grad, with parameters
   that train, and that has blocks.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from memfit.errors import ModelError
from memfit.integrations.imports import ImportWatcher

if TYPE_CHECKING:
    import torch

    from memfit.autopilot import Handle

_ENABLE = ("gradient_checkpointing_enable", "activation_checkpointing_enable")
_TAKEN_OVER = "`{name}` was told to checkpoint its activations: taken over by the plan."


@dataclass(slots=True)
class Catch:
    """One fitted model: its handle, and what the report should say about how it was caught."""

    handle: Handle
    notes: list[str] = field(default_factory=list)


class Launcher:
    """Fits what a script trains.

    Attributes:
        catches: The fitted models, in order.
        refused: Modules that trained but could not be fitted: class name to reason.
    """

    def __init__(self, fit: Callable[..., Handle], options: Mapping[str, object]) -> None:
        self.catches: list[Catch] = []
        self.refused: dict[str, str] = {}
        self._fit = fit
        self._options = dict(options)
        # Modules are compared by identity. All references are weak: what the script drops may go.
        self._fitted: weakref.WeakKeyDictionary[torch.nn.Module, Catch] = weakref.WeakKeyDictionary()
        self._asked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._passed_over: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._undo: list[Callable[[], None]] = []
        self._first_call: _FirstCall | None = None
        self._trainers = 0
        self._watcher = ImportWatcher(
            {
                "torch": self._watch_torch,
                "transformers.modeling_utils": self._watch_models,
                "transformers.trainer": self._watch_trainer,
            }
        )

    def install(self) -> None:
        """Begin to watch the script's imports."""
        self._watcher.install()

    def remove(self) -> None:
        """Take every catch out again. Fitted models stay fitted."""
        self._watcher.remove()
        if self._first_call is not None:
            self._first_call.disarm()
        while self._undo:
            self._undo.pop()()

    def fit(self, model: torch.nn.Module) -> None:
        """Fit a model that trains, once. One that cannot be fitted is passed over, with its reason."""
        model = _unwrap(model)
        if any(module in self._fitted for module in model.modules()):
            return
        try:
            handle = self._fit(model, **self._options)
        except ModelError as error:
            self._passed_over.add(model)
            self.refused[type(model).__name__] = str(error)
            return
        catch = Catch(handle)
        self.catches.append(catch)
        for module in model.modules():
            self._fitted[module] = catch
            if module in self._asked:
                self._asked.discard(module)
                catch.notes.append(_TAKEN_OVER.format(name=type(module).__name__))

    @property
    def is_waiting(self) -> bool:
        """Whether the next training forward may have to be fitted."""
        return not self._trainers and (not self.catches or len(self._asked) > 0)

    def called(self, module: torch.nn.Module) -> None:
        """A module is called from outside any other module."""
        import torch

        if not self.is_waiting or module in self._passed_over or not (module.training and torch.is_grad_enabled()):
            return
        if self.catches and not any(part in self._asked for part in module.modules()):
            return
        if any(parameter.requires_grad for parameter in module.parameters()):
            self.fit(module)

    def _watch_torch(self, torch: ModuleType) -> None:
        self._first_call = _FirstCall(self, torch.nn.Module)
        self._first_call.arm()

    def _watch_models(self, modeling_utils: ModuleType) -> None:
        base = getattr(modeling_utils, "PreTrainedModel", None)
        for name in _ENABLE:
            if hasattr(base, name):
                self._replace(base, name, self._take_over)

    def _take_over(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def enable(model: torch.nn.Module, *args: object, **kwargs: object) -> None:
            catch = self._fitted.get(model)
            if catch is not None:
                catch.notes.append(_TAKEN_OVER.format(name=type(model).__name__))
                return
            self._asked.add(model)
            if self._first_call is not None:
                self._first_call.arm()

        return enable

    def _watch_trainer(self, trainer: ModuleType) -> None:
        self._replace(trainer.Trainer, "train", self._inside_trainer)
        self._replace(trainer.Trainer, "_inner_training_loop", self._fit_trained)

    def _inside_trainer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            # What is called before the loop (a model_init, a probing forward) is not what it will train.
            self._trainers += 1
            try:
                return original(trainer, *args, **kwargs)
            finally:
                self._trainers -= 1

        return train

    def _fit_trained(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def loop(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            self.fit(trainer.model)
            return original(trainer, *args, **kwargs)

        return loop

    def _replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        original = owner.__dict__.get(name)
        if original is None:
            return
        replacement = wrap(original)
        setattr(owner, name, replacement)

        def undo() -> None:
            if owner.__dict__.get(name) is replacement:
                setattr(owner, name, original)

        self._undo.append(undo)


class _FirstCall:
    """Replaces `nn.Module.__call__` while a model is waited for.

    Not a global forward pre-hook: hooks that `fit` puts on the called module itself would come too late for this call.
    Inside the outermost call the class has its own `__call__` again, so only that call is seen, and a compiler that
    looks into it finds nothing new.
    """

    def __init__(self, launcher: Launcher, module_class: Any) -> None:
        self._launcher = launcher
        self._class = module_class
        self._original = module_class.__call__

        def __call__(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.disarm()
            try:
                launcher.called(module)
                return self._original(module, *args, **kwargs)
            finally:
                if launcher.is_waiting:
                    self.arm()

        self._replacement = functools.wraps(self._original)(__call__)

    def arm(self) -> None:
        """See the next call."""
        if self._class.__call__ is self._original:
            self._class.__call__ = self._replacement

    def disarm(self) -> None:
        """The class has its own `__call__` again. Somebody else's replacement is left alone."""
        if self._class.__call__ is self._replacement:
            self._class.__call__ = self._original


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside `DistributedDataParallel`, whose blocks are the same and whose name is not the user's."""
    while type(model).__name__ == "DistributedDataParallel":
        model = model.module  # type: ignore[assignment]
    return model
