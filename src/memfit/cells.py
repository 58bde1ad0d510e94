"""A prediction beside what was measured, as data. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from memfit.predictions import Peak

TRAINS = ("full", "lora", "frozen")
"""What of a model is trained: all of it, adapters, or the upper half of its blocks."""
PLANS = ("plain", "full", "middle", "min")
"""What a step recomputes: nothing, every block, what fits halfway between the smallest peak and the plain one, all that
lowers the peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A real step.

    Attributes:
        peak_bytes: The highest resident set of a step, or on CUDA reserved bytes; ``held``: under a budget.
        unheld_peak_bytes: The same without a budget.
        tensor_bytes: The most that tensors took at one time.
        step_seconds: The fastest step; ``held``: under a budget.
        unheld_step_seconds: The same without a budget.
        beside_bytes: Held between steps beside tensors: by the process, or on CUDA by the allocator.
        allocator: That ran.
        held: Whether the process was held to the highest that was predicted, as `memfit run --budget` holds it.
        peak_of_step: Whether the kernel could tell the peak of a step; else it is that of the whole process.
    """

    peak_bytes: int
    unheld_peak_bytes: int
    tensor_bytes: int
    step_seconds: float
    unheld_step_seconds: float
    beside_bytes: int
    allocator: str
    held: bool
    peak_of_step: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One step, predicted and measured.

    Attributes:
        model: As it was asked for.
        batch, length: Of the step.
        trains: One of `TRAINS`.
        plan: One of `PLANS`.
        peak: Predicted.
        tensor_bytes: Predicted: the most that tensors take at one time.
        step_seconds: Predicted.
        measured: ``None`` where the step did not run.
        reason: Why it did not run; "" where it did.
        failed: Whether it was tried.
    """

    model: str
    batch: int
    length: int
    trains: str
    plan: str
    peak: Peak
    tensor_bytes: int
    step_seconds: float
    measured: Measured | None = None
    reason: str = ""
    failed: bool = False

    @property
    def name(self) -> str:
        """Such as ``batch 2 × 256, lora, plain``."""
        return f"batch {self.batch} × {self.length}, {self.trains}, {self.plan}"

    @property
    def peak_ratio(self) -> float | None:
        """Expected over measured peak."""
        return None if self.measured is None else self.peak.expected / self.measured.peak_bytes

    @property
    def tensor_ratio(self) -> float | None:
        """Predicted over measured bytes of tensors."""
        return None if self.measured is None else self.tensor_bytes / self.measured.tensor_bytes

    @property
    def time_ratio(self) -> float | None:
        """Predicted over measured time."""
        return None if self.measured is None else self.step_seconds / self.measured.step_seconds

    @property
    def under_predicted(self) -> bool:
        """Whether the step took more than the highest that was predicted."""
        return self.measured is not None and self.measured.peak_bytes > self.peak.high

    @property
    def holds(self) -> bool:
        """Whether the prediction is not refuted: a step that failed where it was to fit refutes it."""
        return not self.failed and not self.under_predicted

    def to_dict(self) -> dict[str, Any]:
        """As `json.dumps` takes it: bytes and seconds."""
        measured = None if self.measured is None else asdict(self.measured)
        return {
            "model": self.model,
            "batch": self.batch,
            "seq": self.length,
            "trains": self.trains,
            "plan": self.plan,
            "predicted": {
                "peak_bytes": asdict(self.peak),
                "tensor_bytes": self.tensor_bytes,
                "step_seconds": self.step_seconds,
            },
            "measured": measured,
            "ratios": {"peak": self.peak_ratio, "tensors": self.tensor_ratio, "time": self.time_ratio},
            "holds": self.holds,
            "reason": self.reason,
        }


__all__ = ["PLANS", "TRAINS", "Cell", "Measured"]
