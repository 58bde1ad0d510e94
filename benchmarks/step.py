"""What a training step costs under each peer, and what Memfit makes of the same memory.

For every peer three processes take turns: plain, the peer, and Memfit with the peer's own measured peak as its budget.
A number is the median over the repetitions of a ratio within one repetition, so that a slow minute of the machine hits
both sides of it. Two more rows have no peer: `half` of the activation memory (the plain peak less half of the bytes
that the plain step saves in blocks) and, if asked for, `min`, the smallest peak.

The *bound* is what the solver says an ideal plan for this budget would cost, without Memfit's own work: the difference
between it and the measured ratio is overhead and noise.

    python -m benchmarks.step                          # three shapes, CPU, about half an hour on two cores
    python -m benchmarks.step --shapes llama --peers every-1,half --repetitions 3
    python -m benchmarks.step --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, overhead, peers, record
from benchmarks.tables import overhead_table, show, step_table
from benchmarks.turns import Track, Worker, WorkerError, interleave

HALF, MIN = "half", "min"
ROWS = (*peers.PEERS, HALF, MIN)


def measure_row(
    case: str, row: str, plain: Worker, *, plain_peak_bytes: int, saved_bytes: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: the peer (where there is one) and Memfit at its peak, in turns with plain.

    Returns:
        JSON. A side that failed has ``error`` instead of numbers: one broken peer should not cost an hour's run.
    """
    result: dict[str, Any] = {"row": row}
    has_peer = row in peers.PEERS
    budget: int | str = MIN
    workers = [plain]
    with _Closing() as closing:
        if row == HALF:
            budget = plain_peak_bytes - saved_bytes // 2
        if has_peer:
            try:
                peer = closing.open(Worker(case, row, device=args.device))
                budget = max(step["peak_bytes"] for step in peer.steps(args.warmup)[1:])
                peer.make_room()
                workers.append(peer)
            except WorkerError as error:
                return {**result, "peer": {"error": str(error)}}
        result["budget_bytes"] = None if budget == MIN else budget
        memfit = None
        if not args.no_memfit:
            try:
                memfit = closing.open(Worker(case, "memfit", device=args.device, budget=budget))
                warm = memfit.steps(args.warmup)
                memfit.make_room()
                workers.append(memfit)
            except WorkerError as error:
                result["memfit"] = {"error": str(error)}
                memfit = None
        try:
            tracks = interleave(workers, repetitions=args.repetitions, steps=args.steps, untimed=1)
        except WorkerError as error:
            return {**result, "error": str(error)}
        base = tracks[0]
        result["plain"] = _track(base, base)
        if has_peer:
            result["peer"] = _track(tracks[1], base)
        if memfit is not None:
            track = tracks[-1]
            result["memfit"] = {**_track(track, base), "summary": memfit.ask("summary")}
            # Every planned step has to hold the budget, the first ones too.
            highest = max(track.peak_bytes, *(step["peak_bytes"] for step in warm[1:]))
            result["memfit"]["peak_bytes"] = highest
            result["memfit"]["first_step_peak_bytes"] = warm[0]["peak_bytes"]
            result["memfit"]["first_step_seconds"] = warm[0]["seconds"]
            if has_peer:
                result["memfit"]["against_peer"] = track.ratio(tracks[1])
                result["memfit"]["same_losses_as_peer"] = track.losses == tracks[1].losses
            bound = result["memfit"]["summary"].get("bound_recompute_seconds")
            if bound is not None:
                result["memfit"]["bound_ratio"] = 1 + bound / statistics.median(base.seconds)
    return result


class _Closing:
    """Closes the workers of one row, whatever happens."""

    def __init__(self) -> None:
        self._open: list[Worker] = []

    def __enter__(self) -> _Closing:
        return self

    def open(self, worker: Worker) -> Worker:
        """Wait until a worker is ready, and close it at the end."""
        self._open.append(worker)
        return worker.__enter__()

    def __exit__(self, *_: object) -> None:
        for worker in self._open:
            worker.close()


def _track(track: Track, base: Track) -> dict[str, Any]:
    return {
        "peak_bytes": track.peak_bytes,
        "seconds": track.seconds,
        "cpu_seconds": track.cpu_seconds,
        "ratio": track.ratio(base),
        "cpu_ratio": track.cpu_ratio(base),
    }


def measure_shape(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """All rows of one shape; the plain process lives through all of them."""
    rows: list[dict[str, Any]] = []
    with Worker(case, "plain", device=args.device) as plain:
        peak = max(step["peak_bytes"] for step in plain.steps(args.warmup)[1:])
        saved = plain.ask("saved")["saved_bytes"]
        plain.make_room()
        for row in args.peers:
            print(f"{case}: {row}", file=sys.stderr, flush=True)
            rows.append(measure_row(case, row, plain, plain_peak_bytes=peak, saved_bytes=saved, args=args))
    return {
        "case": case,
        "title": cases.find(case, args.device).title,
        "plain_peak_bytes": peak,
        "saved_bytes": saved,
        "rows": rows,
    }


def _choices(text: str, allowed: Sequence[str], name: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [item for item in chosen if item not in allowed]:
        raise SystemExit(f"`--{name} {text}`: {', '.join(unknown)} not in {', '.join(allowed)}.")
    return chosen


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    shapes = list(cases.STEP_CASES["cpu"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", default=",".join(shapes), help="which of the three shapes")
    parser.add_argument("--peers", default=",".join(ROWS[:-1]), help=f"which rows of {', '.join(ROWS)}")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="steps per repetition; 1 on CPU, 5 on CUDA")
    parser.add_argument(
        "--warmup", type=int, default=6, help="untimed steps; the first one records, the plan settles by the fifth"
    )
    parser.add_argument("--no-memfit", action="store_true", help="only the peers")
    parser.add_argument("--no-overhead", action="store_true", help="leave the overhead section out")
    parser.add_argument("--only-overhead", action="store_true", help="nothing but the overhead section")
    parser.add_argument("--output", type=Path, default=record.RESULTS, help="folder of the JSON")
    parser.add_argument("--name", default=None, help="name of the JSON; `step-DEVICE`")
    args = parser.parse_args(arguments)
    args.shapes = _choices(args.shapes, shapes, "shapes")
    args.peers = _choices(args.peers, ROWS, "peers")
    args.steps = args.steps or (5 if args.device == "cuda" else 1)
    return args


def main() -> None:
    """Measure, print the tables, write the JSON."""
    args = parse()
    data: dict[str, Any] = {"origin": record.origin("benchmarks.step", sys.argv[1:], device=args.device)}
    if not args.only_overhead:
        data["shapes"] = []
        for case in args.shapes:
            shape = measure_shape(case, args)
            data["shapes"].append(shape)
            show(step_table(shape))
            record.write(args.name or f"step-{args.device}", data, folder=args.output)
    if not (args.no_overhead or args.no_memfit):
        data["overhead"] = overhead.measure(args.shapes, device=args.device)
        show(overhead_table(data["overhead"]))
    path = record.write(args.name or f"step-{args.device}", data, folder=args.output)
    print(f"Written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
