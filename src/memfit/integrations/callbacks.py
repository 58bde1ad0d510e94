"""What the callbacks of all trainers share: options, one fitted model at a time, and a report that outlives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memfit import fit
from memfit.errors import UsageError
from memfit.integrations.catches import Catch
from memfit.integrations.compilers import CompiledInPlace
from memfit.integrations.switches import Held, Switches, before_sharding, decides
from memfit.units import BudgetChoice, parse_budgets

if TYPE_CHECKING:
    import torch

    from memfit.autopilot import Handle
    from memfit.plans import Plan


class FittingCallback:
    """Fits the model that a trainer trains, from the beginning of its training to the end.

    One callback belongs to one trainer. It copies and pickles as its options.

    Attributes:
        options: Of `memfit.fit`.
        handle: Of the model while it trains, else ``None``.
        plan: The last plan that was in force.
    """

    def __init__(self, budget: BudgetChoice = None, **options: Any) -> None:
        """As `memfit.fit`, without the model.

        Raises:
            BudgetError: The budget cannot be read.
        """
        parse_budgets(budget)
        self.options: dict[str, Any] = {"budget": budget, **options}
        self.handle: Handle | None = None
        self.plan: Plan | None = None
        self._catch: Catch | None = None
        self._held: Held | None = None
        self._compiled: CompiledInPlace | None = None
        self._summary: tuple[dict[str, Any], str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["options"])  # type: ignore[misc]

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
            raise UsageError("There is nothing to report: no training has begun. Train with the trainer first.")
        return self._summary

    def metrics(self) -> dict[str, float]:
        """What is logged beside the trainer's own metrics; empty while nothing is fitted."""
        return {} if self._catch is None else self._catch.metrics()

    def start(
        self, model: torch.nn.Module, *, switches: Switches | None = None, trainer: Any = None, optimizer: Any = None
    ) -> None:
        """Fit a model that is about to train.

        Args:
            model: Not yet sharded or compiled.
            switches: What the trainer was told about checkpointing, if anything.
            trainer: Whose own offloading is switched off, and whose compiling is done in place.
            optimizer: What will step, or its name, if the user named none.

        Raises:
            UsageError: The callback is at work in another trainer.
            MemfitError: As `memfit.fit`.
        """
        if self.handle is not None:
            raise UsageError("This MemfitCallback is at work in another trainer. Give each trainer one of its own.")
        self._summary = None
        held = Held(model, trainer)
        if switches is None or not switches.flag:
            switches = Switches("gradient_checkpointing_enable()" if held.was_on else "")
        options = switches.options(self.options)
        if options.get("optimizer") is None:
            options["optimizer"] = optimizer
        compiled = CompiledInPlace(model, trainer, decided=decides(options))
        try:
            with before_sharding(trainer):
                self.handle = fit(model, **options)
        except BaseException:
            compiled.restore()
            held.restore()
            raise
        self._held, self._compiled = held, compiled
        notes = [*switches.notes(decided=decides(self.options)), *held.notes, *compiled.notes]
        self._catch = Catch(self.handle, notes)

    def end(self, error: BaseException | None = None) -> None:
        """Training is over, by an error perhaps: the model is what it was, the report stays.

        A second call does nothing.
        """
        catch, self._catch = self._catch, None
        handle, self.handle = self.handle, None
        held, self._held = self._held, None
        compiled, self._compiled = self._compiled, None
        if catch is None or handle is None:
            return
        self._summary = catch.summary(), catch.report()
        self.plan = handle.plan
        handle.__exit__(None if error is None else type(error), error, None)
        if compiled is not None:
            compiled.restore()
        if held is not None:
            held.restore()
