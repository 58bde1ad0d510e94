"""`MemfitCallback` for the Trainer of Hugging Face transformers, and all that are built on it.

A Trainer tells its callbacks of the model before it trains at one moment only, at the end of its own `__init__`. That
is too early: `model_init` makes another model, subclasses go on building theirs. `on_train_begin` is too late: the
model is sharded or compiled by then. So the callback is told by the Trainer's training loop itself, whose method is
wrapped once, when the first callback is made. Trainers without the callback do not notice.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import Trainer, TrainerCallback

from memfit.errors import UsageError
from memfit.integrations.callbacks import FittingCallback
from memfit.integrations.switches import Switches, check_sharding

__all__ = ["MemfitCallback"]

_OPTIMIZERS = ("sgd", "adagrad", "rmsprop", "adafactor")
"""Of those whose state is not AdamW's, the ones that a Trainer calls as `fit` does."""


class MemfitCallback(FittingCallback, TrainerCallback):  # type: ignore[misc]
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
        super().__init__(budget, **options)
        _watch(Trainer)

    def begin(self, trainer: Any) -> None:
        """The trainer's loop begins; its model is still itself.

        Raises:
            UsageError: FSDP is to checkpoint activations as well, or the callback is at work in another Trainer.
            MemfitError: As `memfit.fit`.
        """
        check_sharding(trainer.args, getattr(trainer, "accelerator", None))
        switches = Switches.of_arguments(trainer.args)
        self.start(trainer.model, switches=switches, trainer=trainer, optimizer=_optimizer_of(trainer))
        # What is logged must be there before TensorBoard and the like read it.
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

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
        if logs is None or not {"loss", "train_runtime"} & logs.keys():
            return
        metrics = self.metrics()
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
