"""A model that an integration fitted: its handle, and what the report should say of how it was caught."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memfit.report.text import render

if TYPE_CHECKING:
    from memfit.autopilot import Handle


@dataclass(slots=True)
class Catch:
    """One fitted model.

    Attributes:
        handle: Its handle.
        notes: What the report says beside the handle's own notes.
        caught: Which hook caught it, as a sentence; "" if the user asked for it by name.
    """

    handle: Handle
    notes: list[str] = field(default_factory=list)
    caught: str = ""

    def summary(self) -> dict[str, Any]:
        """The handle's, with what is noted here."""
        summary = self.handle.summary()
        notes = dict.fromkeys([self.caught, *(summary.get("notes") or ()), *self.notes])
        return {**summary, "notes": list(filter(None, notes))}

    def report(self) -> str:
        """The same as text."""
        return render(self.summary())

    def metrics(self) -> dict[str, float]:
        """What belongs beside a training loop's own metrics: bytes, and recomputation as a share of the step."""
        summary = self.handle.summary()
        found: dict[str, float] = {}
        for name in ("measured_peak_bytes", "predicted_peak_bytes"):
            if summary[name] is not None:
                found[f"memfit/{name}"] = summary[name]
        if summary["recompute_seconds"] is not None and summary["step_seconds"]:
            found["memfit/overhead"] = summary["recompute_seconds"] / summary["step_seconds"]
        return found
