"""Find the model that an unmodified script trains, and fit it.

Three catches, each installed when the script imports what it hangs on; nothing is imported on our account:

1. `transformers.Trainer`: its model, when the training loop is entered. The model is then still itself, before
   accelerate wraps, shards or compiles it. Its switches are taken over as by `MemfitCallback`.
2. `gradient_checkpointing_enable` and `activation_checkpointing_enable` of a Hugging Face model: what is asked for is
   taken over. The model is fitted at its first training forward, not in the call: LoRA, freezing and the move to the
   device usually come after it.
3. Otherwise the first module that is called from outside any other module, in training mode, with grad, with parameters
   that train, and that has blocks.

A model that the script fits itself, by `memfit.fit` or a callback, keeps the script's options, and is reported.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from memfit.errors import ModelError
from memfit.integrations import llamafactory, processes
from memfit.integrations.catches import Catch
from memfit.integrations.compilers import CompiledInPlace
from memfit.integrations.imports import ImportWatcher
from memfit.integrations.switches import Held, Switches, before_sharding, check_sharding, decides

if TYPE_CHECKING:
    import torch

    from memfit.autopilot import Handle

_ENABLE = ("gradient_checkpointing_enable", "activation_checkpointing_enable")
_CAUGHT = "`{name}` was caught by {hook}"
_BY_TRAINER = "transformers' Trainer, when its training loop began"
_BY_CALL = "its first training forward"


class Launcher:
    """Fits what a script trains.

    Attributes:
        catches: The fitted models, in order.
        refused: Modules that trained but could not be fitted: class name to reason.
        idle: Modules that were called and did not train: class name to reason.
        handed_over: Whether the script has started processes of its own under Memfit: they report.
    """

    def __init__(
        self, fit: Callable[..., Handle], options: Mapping[str, object], words: Sequence[str] = ("run",)
    ) -> None:
        """Fit with ``options``; ``words`` say the same on the command line, for processes that the script starts."""
        self.catches: list[Catch] = []
        self.refused: dict[str, str] = {}
        self.idle: dict[str, str] = {}
        self.handed_over = False
        self._fit = fit
        self._options = dict(options)
        self._words = tuple(words)
        # Modules are compared by identity. All references are weak: what the script drops may go.
        self._fitted: weakref.WeakKeyDictionary[torch.nn.Module, Catch] = weakref.WeakKeyDictionary()
        self._asked: weakref.WeakKeyDictionary[torch.nn.Module, Switches] = weakref.WeakKeyDictionary()
        self._passed_over: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._undo: list[Callable[[], None]] = []
        self._first_call: _FirstCall | None = None
        self._trainers = 0
        self._watcher = ImportWatcher(
            {
                "torch": self._watch_torch,
                "transformers.modeling_utils": self._watch_models,
                "transformers.trainer": self._watch_trainer,
                llamafactory.CHECKPOINTING: self._watch_llamafactory,
                processes.LLAMA_FACTORY: self._watch_torchrun,
                **dict.fromkeys(processes.LIGHTNING, self._watch_lightning),
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

    def fit(self, model: torch.nn.Module, hook: str = _BY_CALL) -> Catch | None:
        """Fit a model that trains, once. One that cannot be fitted is passed over, with its reason."""
        model = _unwrap(model)
        known = [self._fitted[module] for module in model.modules() if module in self._fitted]
        if known:
            return known[0]
        asked = {module: self._asked[module] for module in model.modules() if module in self._asked}
        switches = next(iter(asked.values()), Switches())
        handle = _own_handle(model)
        hook = hook if handle is None else "the script, which fitted it itself: its options hold"
        try:
            handle = handle or self._fit(model, **switches.options(self._options))
        except ModelError as error:
            self._passed_over.add(model)
            self.refused[type(model).__name__] = str(error)
            return None
        catch = Catch(handle, caught=_CAUGHT.format(name=type(model).__name__, hook=hook))
        self.catches.append(catch)
        for module in model.modules():
            self._fitted[module] = catch
        for module in asked:
            self._note(catch, module, self._asked.pop(module))
        return catch

    def _note(self, catch: Catch, module: torch.nn.Module, switches: Switches) -> None:
        notes = switches.taken_over(type(module).__name__, decided=decides(self._options))
        catch.notes += [note for note in notes if note not in catch.notes]  # some ask again before every update

    @property
    def is_waiting(self) -> bool:
        """Whether the next training forward may have to be fitted."""
        return not self._trainers and (not self.catches or len(self._asked) > 0)

    def called(self, module: torch.nn.Module) -> None:
        """A module is called from outside any other module."""
        import torch

        if not self.is_waiting:
            return
        module = _unwrap(module)  # Lightning leaves the wrapper in evaluation mode, after it has evaluated
        if module in self._passed_over:
            return
        if self.catches and not any(part in self._asked for part in module.modules()):
            return
        why = ""
        if not (module.training and torch.is_grad_enabled()):
            why = "called in evaluation mode" if not module.training else "called without gradients"
        elif not any(parameter.requires_grad for parameter in module.parameters()):
            why = "none of its parameters trains" if any(True for _ in module.parameters()) else ""
        else:
            self.fit(module)
            return
        if why:
            self.idle[type(module).__name__] = why

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
            self._ask(model, Switches.of_call(f"{original.__name__}()", args, kwargs))

        return enable

    def _ask(self, model: torch.nn.Module, switches: Switches) -> None:
        """A model was told about checkpointing."""
        catch = self._fitted.get(model)
        if catch is not None:
            self._note(catch, model, switches)
            return
        self._asked[model] = switches
        if self._first_call is not None:
            self._first_call.arm()

    def _watch_llamafactory(self, checkpointing: ModuleType) -> None:
        wrap = functools.partial(llamafactory.tell_switches, told=self._ask)
        self._replace(checkpointing, "prepare_model_for_training", wrap)

    def _watch_torchrun(self, starter: ModuleType) -> None:
        def change(command: Any) -> list[str] | None:
            changed = processes.torchrun_under_memfit(command, self._words)
            self.handed_over = self.handed_over or changed is not None
            return changed

        self._replace(starter, "subprocess", functools.partial(processes.starts_memfit, change=change))

    def _watch_lightning(self, starter: ModuleType) -> None:
        change = functools.partial(processes.python_under_memfit, words=self._words)
        self._replace(starter, "subprocess", functools.partial(processes.starts_memfit, change=change))

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
            check_sharding(trainer.args, getattr(trainer, "accelerator", None))
            compiled = CompiledInPlace(trainer.model, trainer, decided=decides(self._options))
            with before_sharding(trainer):
                catch = self.fit(trainer.model, _BY_TRAINER)
            if catch is None:
                compiled.restore()
                return original(trainer, *args, **kwargs)
            held = Held(trainer.model, trainer)
            catch.notes += [*held.notes, *compiled.notes]
            try:
                return original(trainer, *args, **kwargs)
            finally:
                held.restore()
                compiled.restore(model=False)  # it stays fitted, and compiled with the plan

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


def _own_handle(model: torch.nn.Module) -> Handle | None:
    """The handle of a model that somebody else has fitted, or of a part of it."""
    from memfit.handle import fitted_models

    references = [fitted_models[module] for module in model.modules() if module in fitted_models]
    return references[0]() if references else None


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside `DistributedDataParallel` or DeepSpeed's engine, whose name is not the user's."""
    from memfit.sharding import unwrapped

    while type(model).__name__ == "DistributedDataParallel":
        model = model.module  # type: ignore[assignment]
    return unwrapped(model)
