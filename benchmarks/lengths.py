"""What does a budget cost when every batch has another length? Against nothing and against checkpointing every layer.

Nearly every step has a shape that was not seen before. The three take turns, a few steps each, on the same batches; the
first steps, in which Memfit records and plans, are shown apart from those that follow.

    python -m benchmarks.lengths                     # about ten minutes on two cores
    python -m benchmarks.lengths --steps 200
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import cases, record
from benchmarks.tables import show
from benchmarks.turns import Track, Worker, interleave
from memfit.units import format_bytes

CASE = "lengths"
FIRST_STEPS = 8
STEPS_IN_TURN = 4
SHARES = (0.5, 1.0)
"""Of what checkpointing every layer saves: the budgets."""


def measure(*, device: str, steps: int) -> list[dict[str, Any]]:
    """One row for each configuration.

    Raises:
        WorkerError: One of them failed.
    """
    plain, checkpointed = _peaks(device, steps)
    budgets = {f"memfit-{share:g}": plain - int(share * (plain - checkpointed)) for share in SHARES}
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker(
                    CASE, peer.partition("-")[0] if peer in budgets else peer, device=device, budget=budgets.get(peer)
                )
            )
            for peer in ("plain", "every-1", *budgets)
        ]
        first = interleave(workers, repetitions=FIRST_STEPS // STEPS_IN_TURN, steps=STEPS_IN_TURN)
        later = interleave(workers, repetitions=steps // STEPS_IN_TURN, steps=STEPS_IN_TURN)
        summaries = [worker.ask("summary") for worker in workers]
    return [
        {
            "peer": peer,
            "budget_bytes": budgets.get(peer),
            "peak_bytes": max(start.peak_bytes, then.peak_bytes),
            "first_ratio": _ratio(start, first[0]),
            "ratio": _ratio(then, later[0]),
            "cpu_ratio": sum(then.cpu_seconds) / sum(later[0].cpu_seconds),
            "same_losses": start.losses + then.losses == first[0].losses + later[0].losses,
            "summary": {name: value for name, value in summary.items() if name != "notes"},
        }
        for peer, start, then, summary in zip(("plain", "every-1", *budgets), first, later, summaries, strict=True)
    ]


def _peaks(device: str, steps: int) -> tuple[int, int]:
    """Without Memfit: saving everything, and checkpointing every layer."""
    found = []
    for peer in ("plain", "every-1"):
        with Worker(CASE, peer, device=device) as worker:
            found.append(max(step["peak_bytes"] for step in worker.steps(FIRST_STEPS + steps)))
    return found[0], found[1]


def _ratio(track: Track, base: Track) -> float:
    return sum(track.seconds) / sum(base.seconds)


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """One row for each configuration."""
    shown = Table(title=title)
    shown.add_column("")
    for column in ("budget", "peak", f"first {FIRST_STEPS} steps", "later steps", "CPU time", "losses"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row["peer"],
            format_bytes(row["budget_bytes"]) if row["budget_bytes"] else "",
            format_bytes(row["peak_bytes"]),
            f"{row['first_ratio']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['cpu_ratio']:.3f}",
            "equal" if row["same_losses"] else "DIFFER",
        )
    return shown


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=48, help="later steps")
    parser.add_argument("--output", type=Path, default=record.RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    rows = measure(device=args.device, steps=args.steps)
    show(table(rows, cases.find(CASE, args.device).title))
    data = {"origin": record.origin("benchmarks.lengths", sys.argv[1:], device=args.device), "rows": rows}
    print(f"Written to {record.write(f'lengths-{args.device}', data, folder=args.output)}", file=sys.stderr)


if __name__ == "__main__":
    main()
