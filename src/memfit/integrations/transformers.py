"""`MemfitCallback` for the Trainer of Hugging Face transformers, and all that are built on it.

A Trainer tells its callbacks of the model before it trains at one moment only, at the end of its own `__init__`. That
is too early: `model_init` makes another model, subclasses go on building theirs. `on_train_begin` is too late: the
model is sharded or compiled by then. So the callback is told by the Trainer's training loop itself, whose method is
wrapped once, when the first callback is made. Trainers without the callback do not notice.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from memfit import fit
from memfit.errors import UsageError
from memfit.integrations.catches import Catch
from memfit.integrations.switches import Held, Switches, check_sharding, decides
from memfit.units import parse_budget

if TYPE_CHECKING:
    from memfit.autopilot import Handle
    from memfit.plans import Plan

__all__ = ["MemfitCallback"]

_OPTIMIZERS = ("sgd", "adagrad", "rmsprop", "adafactor")
"""Of those whose state is not AdamW's, the ones that a Trainer calls as `fit` does."""


class MemfitCallback(TrainerCallback):  # type: ignore[misc]
    """Fits the model that a Trainer trains, from the beginning of `train` to its end.

    One callback belongs to one Trainer. It copies and pickles as its options.

    Attributes:
        options: Of `memfit.fit`.
        handle: Of the model while it trains, else ``None``.
        plan: The last plan that was in force.
    """

    def __init__(self, budget: int | float | str | None = None, **options: Any) -> None:
        """As `memfit.fit`, without the model.

        Raises:
            BudgetError: The budget cannot be read.
        """
        parse_budget(budget)
        self.options: dict[str, Any] = {"budget": budget, **options}
        self.handle: Handle | None = None
        self.plan: Plan | None = None
        self._reset()
        _watch(Trainer)

    def _reset(self) -> None:
        self._catch: Catch | None = None
        self._held: Held | None = None
        self._summary: tuple[dict[str, Any], str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["options"])  # type: ignore[misc]

    # Reading

    def summary(self) -> dict[str, Any]:
        """What was decided, predicted and measured, as data: now, or at the end of the last training.

        Raises:
            UsageError: No training has begun.
        """
        return self._read()[0]

    def report(self) -> str:
        """The same as text."""
        return self._read()[1]

    def _read(self) -> tuple[dict[str, Any], str]:
        if self._catch is not None:
            return self._catch.summary(), self._catch.report()
        if self._summary is None:
            raise UsageError("There is nothing to report: no training has begun. Call `trainer.train()` first.")
        return self._summary

    # Fitting

    def begin(self, trainer: Any) -> None:
        """The trainer's loop begins; its model is still itself.

        Raises:
            UsageError: FSDP is to checkpoint activations as well, or the callback is at work in another Trainer.
            MemfitError: As `memfit.fit`.
        """
        if self.handle is not None:
            raise UsageError("This MemfitCallback is at work in another Trainer. Give each Trainer one of its own.")
        check_sharding(trainer.args, getattr(trainer, "accelerator", None))
        model = trainer.model
        switches = Switches.of_arguments(trainer.args)
        self._reset()
        self._held = Held(model, trainer)
        if self._held.was_on and not switches.flag:
            switches = Switches("gradient_checkpointing_enable()")
        options = switches.options(self.options)
        if options.get("optimizer") is None:
            options["optimizer"] = _optimizer_of(trainer)
        try:
            self.handle = fit(model, **options)
        except BaseException:
            self._held.restore()
            raise
        notes = [*switches.notes(decided=decides(self.options)), *self._held.notes]
        self._catch = Catch(self.handle, notes)
        # What is logged must be there before TensorBoard and the like read it.
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def end(self, error: BaseException | None = None) -> None:
        """Training is over, by an error perhaps: the model is what it was, the report stays. A second call does
        nothing."""
        catch, self._catch = self._catch, None
        handle, self.handle = self.handle, None
        if catch is None or handle is None:
            return
        self._summary = catch.summary(), catch.report()
        self.plan = handle.plan
        handle.__exit__(None if error is None else type(error), error, None)
        if self._held is not None:
            self._held.restore()
            self._held = None

    # Events

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A Trainer is there: refuse what can be refused before anything is loaded."""
        check_sharding(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is prepared, and must have been fitted before.

        Raises:
            UsageError: This Trainer has a training loop of its own, which never told us.
        """
        if self.handle is None:
            raise UsageError(
                "This Trainer replaces `_inner_training_loop`, so its model was not fitted before it was wrapped. Call "
                "`memfit.fit(model, ...)` yourself before `train()`, and leave the callback out."
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add our metrics to those of training."""
        if self._catch is None or logs is None or not {"loss", "train_runtime"} & logs.keys():
            return
        metrics = self._catch.metrics()
        logs.update(metrics)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is what it was."""
        self.end()


def _optimizer_of(trainer: Any) -> Any:
    """The optimizer that will step, or its name, as far as that is known before it is made."""
    if getattr(trainer.optimizer, "param_groups", None):
        return trainer.optimizer
    name = getattr(trainer.args.optim, "value", trainer.args.optim)
    return name if name in _OPTIMIZERS else None


def _watch(trainer_class: Any) -> None:
    """Let the training loop tell its callbacks when it begins, and when it fails. A second call does nothing."""
    original = trainer_class._inner_training_loop
    if getattr(original, "tells_memfit", False):
        return

    @functools.wraps(original)
    def loop(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, MemfitCallback)]
        if len(callbacks) > 1:
            raise UsageError(f"This Trainer has {len(callbacks)} callbacks of Memfit. Keep one of them.")
        if not callbacks:
            return original(trainer, *args, **kwargs)
        callback = callbacks[0]
        callback.begin(trainer)
        try:
            result = original(trainer, *args, **kwargs)
        except BaseException as error:
            callback.end(error)
            raise
        callback.end()
        return result

    loop.tells_memfit = True  # type: ignore[attr-defined]
    trainer_class._inner_training_loop = loop
