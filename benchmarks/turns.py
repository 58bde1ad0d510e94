"""The parent's side of the workers: start them, let them take turns, read their answers."""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from memfit import host

ROOT = Path(__file__).resolve().parent.parent


_INTERVAL_SECONDS = 0.02


class WorkerError(Exception):
    """A worker failed; the message says how."""


class Worker:
    """One configuration in a process of its own. Use as a context manager."""

    def __init__(
        self,
        case: str,
        peer: str,
        *,
        device: str = "cpu",
        budget: int | str | None = None,
        policy: str | None = None,
        allocator: bool = True,
    ) -> None:
        self.name = peer
        self._device = device
        config = {"case": case, "peer": peer, "device": device, "budget": budget, "policy": policy}
        env = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        if allocator and device == "cpu" and (library := host.find_allocator()):
            env["LD_PRELOAD"] = ":".join(filter(None, [library, env.get("LD_PRELOAD")]))
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=env,
            cwd=ROOT,
            text=True,
        )
        self.allocator: str | None = None

    def __enter__(self) -> Worker:
        try:
            self.allocator = self._answer()["allocator"]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # an unsent command does not matter any more
                pipe.close()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            WorkerError: The worker failed.
        """
        assert self._process.stdin is not None
        self._forget_highest()
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def steps(self, count: int) -> list[dict[str, Any]]:
        """Take several steps."""
        return [self.ask("step") for _ in range(count)]

    def make_room(self) -> None:
        """Hand back what the allocator holds and nobody uses, where others need it: on a GPU.

        Not on CPU: no training does that, and under a budget it takes a heap several steps to find its order again.
        """
        if self._device != "cpu":
            self.ask("release")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # Memfit resets the kernel's high-water mark for its own measurements, also within a step. So it is read from
        # outside as well, while waiting: a peak that the worker no longer sees is seen here.
        highest = 0
        while not select.select([self._process.stdout], [], [], _INTERVAL_SECONDS)[0]:
            highest = max(highest, self._highest_resident_bytes())
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"it ended with {self._process.wait()}"}
        if "peak_bytes" in answer and "allocated_peak_bytes" not in answer:
            answer["peak_bytes"] = max(answer["peak_bytes"], highest)
        if "error" in answer:
            self._process.wait()
            self._errors.seek(0)
            tail = "".join(self._errors.readlines()[-8:])
            raise WorkerError(f"`{self.name}`: {answer['error']}\n{tail}".rstrip())
        return answer

    def _forget_highest(self) -> None:
        """Reset the high-water mark, so that no answer is charged for what came before it."""
        with contextlib.suppress(OSError):  # the worker says so itself
            Path(f"/proc/{self._process.pid}/clear_refs").write_bytes(b"5")

    def _highest_resident_bytes(self) -> int:
        try:
            with open(f"/proc/{self._process.pid}/status", encoding="ascii", errors="replace") as status:
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            return 0  # it has just ended


@dataclass(slots=True, kw_only=True)
class Track:
    """What one worker did in the timed repetitions.

    Attributes:
        seconds: Per repetition, wall time of a step.
        cpu_seconds: The same, CPU time.
        peak_bytes: Highest over all repetitions.
        losses: Of every timed step.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    losses: list[float] = field(default_factory=list)

    def add(self, steps: Sequence[dict[str, Any]]) -> None:
        """Add one repetition."""
        self.seconds.append(statistics.fmean(step["seconds"] for step in steps))
        self.cpu_seconds.append(statistics.fmean(step["cpu_seconds"] for step in steps))
        self.losses += [step["loss"] for step in steps]
        self.see(steps)

    def see(self, steps: Sequence[dict[str, Any]]) -> None:
        """Of steps that are not timed, the peak counts all the same."""
        self.peak_bytes = max(self.peak_bytes, *(step["peak_bytes"] for step in steps))

    def ratio(self, base: Track) -> float:
        """Median over the repetitions of this step time over the base's."""
        return statistics.median(a / b for a, b in zip(self.seconds, base.seconds, strict=True))

    def cpu_ratio(self, base: Track) -> float:
        """The same with CPU time, which a busy neighbour disturbs less."""
        return statistics.median(a / b for a, b in zip(self.cpu_seconds, base.cpu_seconds, strict=True))


def interleave(workers: Sequence[Worker], *, repetitions: int, steps: int, untimed: int = 0) -> list[Track]:
    """Let the workers step in turn, the order reversed in every other repetition; first ``untimed`` steps each."""
    tracks = [Track() for _ in workers]
    if untimed:
        for worker, track in zip(workers, tracks, strict=True):
            track.see(worker.steps(untimed))
    for repetition in range(repetitions):
        pairs = list(zip(workers, tracks, strict=True))
        for worker, track in pairs if repetition % 2 == 0 else reversed(pairs):
            track.add(worker.steps(steps))
    return tracks
