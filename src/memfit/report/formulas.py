"""DeepSpeed-Chat's formula beside the count, as text."""

from __future__ import annotations

from memfit.formulas import Comparison
from memfit.report.text import columns

_TERA = 1e12


def render_comparison(comparison: Comparison) -> list[str]:
    """As lines of a prediction: both numbers for either switch, and where the formula is off."""
    header = ("  DeepSpeed-Chat", "counted", "formula", "", "forwards", "formula")
    rows = [
        (
            f"  {row.name}",
            f"{row.counted_flops / _TERA:.2f}",
            f"{row.formula_flops / _TERA:.2f}",
            f"TFLOPs, {100 * (row.formula_flops / max(row.counted_flops, 1.0) - 1):+.1f}%",
            f"{row.counted_factor:.2f}",
            f"{row.formula_factor:.2f}",
        )
        for row in comparison.rows
    ]
    return [*columns([header, *rows], left={0, 3}), *(f"  off: {sentence}" for sentence in comparison.reasons)]
