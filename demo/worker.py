"""One training process, watched from outside: its events, its peak, its failure."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfit import host

# The kernel's own high-water mark is exact; it is read this often in case the process itself resets it.
_INTERVAL_SECONDS = 0.02


class WorkerError(Exception):
    """A training process failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one training process did.

    Attributes:
        peak_bytes: Highest resident set of the whole process, imports and evaluation included.
        losses: Of every step, with all digits.
        step_seconds: Of every step.
        weights_sha256: Over the bits of all weights after the last step.
        recall_before: Recall@10 on held-out pairs before training; ``None`` if it was not measured.
        recall_after: The same after training.
    """

    peak_bytes: int
    losses: tuple[float, ...]
    step_seconds: tuple[float, ...]
    weights_sha256: str
    recall_before: float | None
    recall_after: float

    @property
    def usual_step_seconds(self) -> float:
        """Median without the first step, which pays for warming up and, under Memfit, for recording."""
        ordered = sorted(self.step_seconds[1:])
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def environment() -> dict[str, str]:
    """What every run gets alike: no network, and tcmalloc where the system has it.

    Memfit would start the script under tcmalloc by itself. The others get it too, so that the peaks differ by what is
    saved, not by what the allocator does not hand back.
    """
    env = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    if library := host.preload_candidate():
        env["LD_PRELOAD"] = ":".join(filter(None, [library, env.get("LD_PRELOAD")]))
    return env


def execute(command: Sequence[str], *, log: Path, on_event: Callable[[dict[str, Any]], None]) -> Run:
    """Run a training command to its end.

    Args:
        command: Writes one JSON object per line to stdout; the last one has ``"event": "after"``.
        log: Gets its stderr.
        on_event: Called with every event.

    Raises:
        WorkerError: It failed; the message ends with the last lines of its stderr.
    """
    events: list[dict[str, Any]] = []
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment(), text=True)
        watch = _Watch(process)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # a library's greeting
                if isinstance(event, dict) and "event" in event:
                    events.append(event)
                    on_event(event)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            watch.join()
    named = {event["event"]: event for event in events}
    if status != 0 or "after" not in named:
        with log.open(encoding="utf-8", errors="replace") as lines:
            tail = "".join(deque(lines, maxlen=15)).rstrip()
        raise WorkerError(f"`{' '.join(command)}` ended with status {status}. Its last words (all in {log}):\n{tail}")
    after = named["after"]
    return Run(
        peak_bytes=watch.peak_bytes,
        losses=tuple(after["losses"]),
        step_seconds=tuple(after["step_seconds"]),
        weights_sha256=after["weights_sha256"],
        recall_before=named["before"]["recall"] if "before" in named else None,
        recall_after=after["recall"],
    )


class _Watch(threading.Thread):
    """Follows the highest resident set of a process until it ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._process = process
        self.start()

    def run(self) -> None:
        path = f"/proc/{self._process.pid}/status"
        while self._process.poll() is None:
            try:
                with open(path, encoding="ascii", errors="replace") as status:
                    for line in status:
                        if line.startswith("VmHWM:"):
                            self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)
                            break
            except OSError:
                pass  # it has just ended
            time.sleep(_INTERVAL_SECONDS)
