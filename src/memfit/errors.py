"""Every deliberate error of Memfit.

Each says what is wrong with its value, the limit that it broke and the way out, and carries its numbers as attributes,
so that a caller can act on them without reading the message. Positional arguments are the error's state: errors
survive pickling between processes.
"""

from __future__ import annotations


class MemfitError(Exception):
    """Base of all deliberate errors; the CLI prints its message without a traceback."""


class UsageError(MemfitError):
    """A call or a command line that cannot mean anything; exit status 2."""


class UnknownNameError(UsageError):
    """A name that no table has.

    Attributes:
        what: What it should name: ``device``, ``model``.
        name: What was given.
        nearest: Names that look like it, or all there are.
        advice: What else would do, as a sentence.
    """

    def __init__(self, what: str, name: str, nearest: tuple[str, ...], advice: str | None = None) -> None:
        super().__init__(what, name, nearest, advice)
        self.what = what
        self.name = name
        self.nearest = nearest
        self.advice = advice

    def __str__(self) -> str:
        shown = self.name if len(self.name) <= 80 else f"{self.name[:77]}..."
        parts = [f"There is no {self.what} `{shown}` that Memfit knows."]
        if self.nearest:
            names = [f"`{name}`" for name in self.nearest]
            parts.append(f"Nearest: {', '.join(names)}.")
        if self.advice:
            parts.append(self.advice)
        return " ".join(parts)


class CalibrationError(MemfitError):
    """The record of a calibration cannot be read or written, or the machine cannot be measured.

    Attributes:
        path: Of the record.
        detail: What is wrong, as sentences.
    """

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(path, detail)
        self.path = path
        self.detail = detail

    def __str__(self) -> str:
        return f"The calibration is `{self.path}`. {self.detail}"


class ModelError(MemfitError):
    """A model, batch, loss or optimizer that cannot be fitted."""


class PlanError(MemfitError):
    """A plan that cannot be read, or that does not belong to the model."""


class BudgetError(MemfitError, ValueError):
    """A budget or a size that cannot be read.

    Attributes:
        value: What was given.
    """

    def __init__(self, message: str, value: object = None) -> None:
        super().__init__(message, value)
        self.value = value

    def __str__(self) -> str:
        return str(self.args[0])


class InfeasibleBudgetError(MemfitError):
    """No plan fits the budget.

    Attributes:
        budget: The limit that no plan fits, in bytes.
        minimum: The smallest peak that is possible, in bytes.
        event: The event of the step that owns that peak, such as ``loss`` or ``backward of model.layers.3``.
        advice: What would lower it, as sentences.
    """

    def __init__(self, budget: int, minimum: int, event: str, advice: str | None = None) -> None:
        super().__init__(budget, minimum, event, advice)
        self.budget = budget
        self.minimum = minimum
        self.event = event
        self.advice = advice

    def __str__(self) -> str:
        from memfit.units import format_bytes  # units raises BudgetError, so it imports this module first

        advice = self.advice or "Lower the batch size, or raise `budget`."
        budget, minimum = format_bytes(self.budget), format_bytes(self.minimum)
        if budget == minimum:  # three digits hide the difference
            budget, minimum = f"{budget} ({self.budget} bytes)", f"{minimum} ({self.minimum} bytes)"
        return f"No plan fits {budget}: the smallest peak is {minimum}, at the {self.event}. {advice}"


class ChangedTensorError(MemfitError, RuntimeError):
    """A tensor that the backward needs is not what it was in the forward; as autograd's own error, a RuntimeError."""


class ChangedEmbeddingError(MemfitError, RuntimeError):
    """A sub-batch whose embeddings are cached was encoded to something else in the backward.

    Attributes:
        batch: Which batch, from 0.
        start, end: Rows of the sub-batch.
    """

    def __init__(self, batch: int, start: int, end: int) -> None:
        super().__init__(batch, start, end)
        self.batch = batch
        self.start = start
        self.end = end

    def __str__(self) -> str:
        return (
            f"Rows {self.start} to {self.end - 1} of batch {self.batch} were encoded to other embeddings in the "
            "backward than in the forward: their gradient would be wrong. The encoder has to do the same twice: draw "
            "random numbers from the default generators of torch, Python or NumPy; change weights, and buffers that "
            "the encoder reads, after `backward()`; leave it uncompiled. Else encode without `cached_embeddings`."
        )


class RecomputeError(MemfitError):
    """A recomputed value is not the value of the forward pass.

    Attributes:
        block: Qualified name of the block.
        value: The saved tensor that differs.
        recipe: The ops that brought it back.
        detail: What was seen, as a sentence.
    """

    def __init__(self, block: str, value: str, recipe: str, detail: str | None = None) -> None:
        super().__init__(block, value, recipe, detail)
        self.block = block
        self.value = value
        self.recipe = recipe
        self.detail = detail

    def __str__(self) -> str:
        detail = f" {self.detail}" if self.detail else ""
        return (
            f"In `{self.block}`, {self.value} was recomputed to another value by {self.recipe}.{detail} "
            "Something that the recording read has changed since the forward pass: undo that change before "
            "`backward()`, or leave the block out with `blocks=`."
        )


class RankError(MemfitError):
    """Ranks that train one model together cannot go on: raised on all of them.

    Attributes:
        rank: The one that it began with.
        detail: What is wrong, as sentences.
    """

    def __init__(self, rank: int, detail: str) -> None:
        super().__init__(rank, detail)
        self.rank = rank
        self.detail = detail

    def __str__(self) -> str:
        return self.detail
