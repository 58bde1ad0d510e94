"""Results as text. Memory is that of the whole process (CPU) or reserved bytes (CUDA)."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from memfit.units import format_bytes

# What the project holds itself to.
HALF_LIMITS = {"llama": 1.03, "heavy": 1.03, "bert": 1.06}
OVERHEAD_LIMITS = {"budget=None": 1.01, "save everything": 1.02}
PEER_LIMIT = 1.02

MIN_WIDTH = 130


def show(table: Table) -> None:
    """Print to stdout, never narrower than the table."""
    console = Console()
    if console.width < MIN_WIDTH:
        console = Console(width=MIN_WIDTH)
    console.print(table)


def _ratio(side: dict[str, Any] | None) -> str:
    if side is None:
        return ""
    return "failed" if "error" in side else f"{side['ratio']:.3f}"


def _peak(side: dict[str, Any] | None) -> str:
    return "" if side is None or "error" in side else format_bytes(side["peak_bytes"])


def limit(case: str, row: dict[str, Any]) -> float | None:
    """The highest time ratio against plain that this row may have, or ``None`` where nothing is promised."""
    peer: dict[str, float] | None = row.get("peer")
    if row["row"] == "half":
        return HALF_LIMITS[case]
    if peer is None or "error" in peer:
        return None
    at_most = PEER_LIMIT * peer["ratio"]
    if row["row"] == "every-1" and case == "llama":
        return min(at_most, 1 + 0.5 * (peer["ratio"] - 1))
    if row["row"] == "every-1" and case == "heavy":
        return peer["ratio"]
    return at_most


def step_table(shape: dict[str, Any]) -> Table:
    """One shape: each peer, and Memfit in the same memory."""
    saved = format_bytes(shape["saved_bytes"])
    table = Table(
        title=f"{shape['title']}: plain peak {format_bytes(shape['plain_peak_bytes'])}, {saved} saved in blocks"
    )
    table.add_column("peer")
    for column in ("peak", "step", "Memfit's peak", "of budget", "step", "limit", "bound", "against peer"):
        table.add_column(column, justify="right")
    for row in shape["rows"]:
        memfit, peer = row.get("memfit"), row.get("peer")
        good = memfit if memfit and "error" not in memfit else {}
        at_most = limit(shape["case"], row)
        budget = row.get("budget_bytes")
        table.add_row(
            row["row"],
            _peak(peer) or (format_bytes(budget) if budget else ""),
            _ratio(peer),
            _peak(memfit),
            f"{good['peak_bytes'] / budget:.1%}" if good and budget else "",
            _ratio(memfit),
            "" if at_most is None else f"{at_most:.3f}",
            f"{good['bound_ratio']:.3f}" if "bound_ratio" in good else "",
            f"{good['against_peer']:.3f}" if "against_peer" in good else "",
        )
    return table


def overhead_table(overhead: dict[str, Any]) -> Table:
    """What Memfit costs when it changes nothing, and per tensor and call."""
    table = Table(title="Overhead")
    table.add_column("what")
    for column in ("measured", "limit"):
        table.add_column(column, justify="right")
    for row in overhead["steps"]:
        value = f"{row['ratio']:.3f} × plain" if "ratio" in row else "failed"
        table.add_row(f"{row['case']}: {row['what']}", value, f"{OVERHEAD_LIMITS[row['what']]:.2f} × plain")
    for row in overhead["micro"]:
        value = f"{row['microseconds']:.2f} µs" if "microseconds" in row else "failed"
        table.add_row(row["what"], value, "" if row.get("limit") is None else f"{row['limit']:.0f} µs")
    return table
