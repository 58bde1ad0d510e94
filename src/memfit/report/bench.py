"""Predictions beside what was measured, as text: a row for each cell, and the verdict first."""

from __future__ import annotations

from collections.abc import Sequence

from memfit.cells import Cell
from memfit.report.text import columns
from memfit.units import format_bytes, format_seconds

_HEADER = ("cell", "predicted", "at most", "measured", "ratio", "unheld", "tensors", "ratio", "step", "measured", "")


def render_cells(cells: Sequence[Cell]) -> str:
    """A table without a newline at its end."""
    measured = [cell for cell in cells if cell.measured is not None]
    broken = [cell for cell in cells if not cell.holds]
    verdict = f"{len(measured) - sum(cell.under_predicted for cell in measured)} of {len(measured)} measured steps"
    lines = [f"{verdict} took at most the highest that was predicted, of {len(cells)} cells"]
    lines += ["", *columns([_HEADER, *(_row(cell) for cell in cells)], left={0, 10})]
    lines += [""] * bool(broken)
    for cell in broken:
        lines.append(f"does not hold: {cell.name}{f': {cell.reason}' if cell.reason else ''}")
    for kind, ratios in (
        ("peak", [cell.peak_ratio for cell in measured]),
        ("tensors", [cell.tensor_ratio for cell in measured]),
        ("time", [cell.time_ratio for cell in measured]),
    ):
        known = [ratio for ratio in ratios if ratio is not None]
        if known:
            lines.append(f"{kind}: predicted is {min(known):.3f} to {max(known):.3f} of measured")
    return "\n".join(lines)


def _row(cell: Cell) -> tuple[str, ...]:
    predicted = (cell.name, format_bytes(cell.peak.expected), format_bytes(cell.peak.high))
    found = cell.measured
    if found is None:
        return (*predicted, *("",) * 7, cell.reason if not cell.failed else "failed")
    return (
        *predicted,
        format_bytes(found.peak_bytes),
        f"{cell.peak_ratio:.3f}",
        format_bytes(found.unheld_peak_bytes),
        format_bytes(found.tensor_bytes),
        f"{cell.tensor_ratio:.3f}",
        format_seconds(cell.step_seconds),
        format_seconds(found.step_seconds),
        "under-predicted" if cell.under_predicted else "",
    )
