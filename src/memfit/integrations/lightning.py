"""`MemfitCallback` for the Trainer of Lightning 2, whether it is imported as `lightning` or as `pytorch_lightning`.

Lightning tells its callbacks that a fit begins when the model is on its device and wrapped for data parallelism, around
the module and not inside it: early enough. Strategies that shard the module have done so by then, and are refused.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from memfit.errors import UsageError
from memfit.integrations.callbacks import FittingCallback

if TYPE_CHECKING:
    import torch

__all__ = ["MemfitCallback"]

_SHARDING = ("FSDP", "ModelParallel", "DeepSpeed")


def _bases() -> tuple[Any, ...]:
    """The `Callback` of each name under which Lightning is there; each has classes of its own."""
    names = ("lightning.pytorch", "pytorch_lightning")
    loaded = [name for name in names if name in sys.modules]
    there = loaded or [name for name in names if find_spec(name.partition(".")[0]) is not None][:1]
    return tuple(import_module(f"{name}.callbacks").Callback for name in there or names[:1])


class MemfitCallback(FittingCallback, *_bases()):  # type: ignore[misc]
    """Fits the model that a Trainer trains, from the beginning of `fit` to its end.

    That is the only child of the `LightningModule` that has parameters, else the `LightningModule` itself. One callback
    belongs to one Trainer. It copies and pickles as its options.

    Attributes:
        options: Of `memfit.fit`.
        handle: Of the model while it trains, else ``None``.
        plan: The last plan that was in force.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The model is on its device.

        Raises:
            UsageError: The strategy shards the model, or the callback is at work in another Trainer.
            MemfitError: As `memfit.fit`.
        """
        strategy = type(trainer.strategy).__name__
        if any(name in strategy for name in _SHARDING):
            raise UsageError(
                f"`{strategy}` has sharded the model before a callback can fit it. Take MemfitCallback out, or use a "
                "strategy that leaves the module whole: `auto`, `ddp`."
            )
        optimizers = trainer.strategy.optimizers
        self.start(_trained(pl_module), optimizer=optimizers[0] if len(optimizers) == 1 else None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add our metrics to those of the step."""
        metrics = self.metrics()
        if metrics:
            pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The model is what it was."""
        self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Training has failed."""
        self.end(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Training is over, whatever became of it."""
        self.end()


def _trained(pl_module: torch.nn.Module) -> torch.nn.Module:
    """What is called as a whole: Lightning itself calls a step, not the module's forward."""
    children = [child for child in pl_module.children() if any(True for _ in child.parameters())]
    own = any(True for _ in pl_module.parameters(recurse=False))
    return children[0] if len(children) == 1 and not own else pl_module
