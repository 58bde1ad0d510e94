"""Is a budget held? Model by model, each run in a process of its own.

For every model a plain process measures the plain peak and the bytes saved in blocks. Then, for every budget, a fresh
process trains under `memfit.fit`: the highest resident set of every step but the first, the one in which the
optimizer's state is born included, has to stay under the budget, and close to what was predicted.

    python -m benchmarks.budget_held                        # all pairs, about ten minutes on two cores
    python -m benchmarks.budget_held --only llama-adamw:0.5,bert-sgd:min
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import cases, record
from benchmarks.tables import show
from benchmarks.turns import Worker, WorkerError
from memfit.units import format_bytes

NUM_STEPS = 6
# What share of the bytes that the plain step saves in blocks the budget takes away; `min` is the smallest peak.
SHARES: tuple[float | str, ...] = (0.5, 0.7)
MIN_CASES = ("llama-adamw", "bert-sgd")
PAIRS: tuple[tuple[str, float | str], ...] = (
    *((case, share) for case in cases.HELD_CASES for share in SHARES),
    *((case, "min") for case in MIN_CASES),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One model and budget.

    Attributes:
        case: Name in `cases.HELD_CASES`.
        share: Share of the saved bytes that the budget takes away, or ``min``.
        plain_peak_bytes: Highest resident set without Memfit, the first step left out.
        plain_predicted_bytes: What Memfit says that saving everything would need.
        budget_bytes: What was asked for; for ``min`` what Memfit predicts.
        predicted_bytes: Memfit's prediction.
        measured_bytes: Highest resident set, the first step left out.
        reported_bytes: What Memfit itself says it measured.
        allocator: Of the process.
        modes: How many block calls ran in which mode.
    """

    case: str
    share: float | str
    plain_peak_bytes: int
    plain_predicted_bytes: int
    budget_bytes: int
    predicted_bytes: int
    measured_bytes: int
    reported_bytes: int
    allocator: str | None
    modes: dict[str, int]

    @property
    def held(self) -> bool:
        """Whether the measured peak is at or under the budget; for ``min``, close to the prediction."""
        return self.measured_bytes <= self.budget_bytes if self.share != "min" else self.close

    @property
    def error(self) -> float:
        """Measured over predicted, less one."""
        return self.measured_bytes / self.predicted_bytes - 1

    @property
    def close(self) -> bool:
        """Whether the prediction was good: within 5% under tcmalloc, within 15% elsewhere."""
        return abs(self.error) <= (0.05 if self.allocator == "tcmalloc" else 0.15)


def plain(case: str, *, allocator: bool = True) -> tuple[int, int]:
    """The plain peak and the bytes that the plain step saves in blocks."""
    with Worker(case, "plain", allocator=allocator) as worker:
        peak = max(step["peak_bytes"] for step in worker.steps(NUM_STEPS)[1:])
        return peak, worker.ask("saved")["saved_bytes"]


def measure(case: str, share: float | str, *, plain_peak_bytes: int, saved_bytes: int, allocator: bool = True) -> Held:
    """Train under a budget and compare.

    Raises:
        WorkerError: The training failed, for instance because no plan fits.
    """
    budget: int | str = "min" if isinstance(share, str) else plain_peak_bytes - int(share * saved_bytes)
    with Worker(case, "memfit", budget=budget, allocator=allocator) as worker:
        measured = max(step["peak_bytes"] for step in worker.steps(NUM_STEPS)[1:])
        summary = worker.ask("summary")
        return Held(
            case=case,
            share=share,
            plain_peak_bytes=plain_peak_bytes,
            plain_predicted_bytes=summary["plain_peak_bytes"],
            budget_bytes=summary["predicted_peak_bytes"] if isinstance(budget, str) else budget,
            predicted_bytes=summary["predicted_peak_bytes"],
            measured_bytes=measured,
            reported_bytes=summary["measured_peak_bytes"],
            allocator=worker.allocator,
            modes=summary["modes"],
        )


def table(results: list[Held], failures: list[tuple[str, float | str, str]]) -> Table:
    """One row per pair."""
    shown = Table(title="Is the budget held? Resident set of the whole process")
    shown.add_column("model")
    shown.add_column("taken away")
    for column in ("plain", "budget", "predicted", "measured", "error", "held"):
        shown.add_column(column, justify="right")
    for held in results:
        shown.add_row(
            held.case,
            str(held.share),
            format_bytes(held.plain_peak_bytes),
            format_bytes(held.budget_bytes),
            format_bytes(held.predicted_bytes),
            format_bytes(held.measured_bytes),
            f"{held.error:+.1%}",
            "yes" if held.held and held.close else "held, far off" if held.held else "NO",
        )
    for case, share, _ in failures:
        shown.add_row(case, str(share), "", "", "", "", "", "failed")
    return shown


def _pairs(text: str) -> list[tuple[str, float | str]]:
    pairs: list[tuple[str, float | str]] = []
    for item in text.split(","):
        case, _, share = item.partition(":")
        if case not in cases.HELD_CASES:
            raise SystemExit(f"`{case}` is not one of {', '.join(cases.HELD_CASES)}.")
        pairs.append((case, "min" if share == "min" else float(share or 0.5)))
    return pairs


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_pairs, default=list(PAIRS), metavar="CASE:SHARE,…", help="which pairs")
    parser.add_argument("--system-allocator", action="store_true", help="without tcmalloc")
    parser.add_argument("--plain", action="store_true", help="only the plain peaks")
    parser.add_argument("--output", type=Path, default=record.RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    allocator = not args.system_allocator
    plains: dict[str, tuple[int, int]] = {}
    results: list[Held] = []
    failures: list[tuple[str, float | str, str]] = []
    for case, share in args.only:
        print(f"{case}: {share}", file=sys.stderr, flush=True)
        try:
            if case not in plains:
                plains[case] = plain(case, allocator=allocator)
            peak, saved = plains[case]
            if args.plain:
                print(f"{case}: plain {format_bytes(peak)}, {format_bytes(saved)} saved in blocks")
                continue
            held = measure(case, share, plain_peak_bytes=peak, saved_bytes=saved, allocator=allocator)
            results.append(held)
            print(f"  {format_bytes(held.measured_bytes)} of {format_bytes(held.budget_bytes)}", file=sys.stderr)
        except WorkerError as error:
            failures.append((case, share, str(error)))
            print(f"  {error}", file=sys.stderr)
    if args.plain:
        return
    show(table(results, failures))
    rows: list[dict[str, Any]] = [{**asdict(held), "held": held.held, "close": held.close} for held in results]
    data = {
        "origin": record.origin("benchmarks.budget_held", sys.argv[1:], device="cpu"),
        "pairs": rows,
        "failures": [{"case": case, "share": share, "error": message} for case, share, message in failures],
    }
    name = "budget-held" if allocator else "budget-held-system-allocator"
    print(f"Written to {record.write(name, data, folder=args.output)}", file=sys.stderr)


if __name__ == "__main__":
    main()
