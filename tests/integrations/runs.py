"""Training runs in processes of their own, with and without Memfit, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTUP = Path(__file__).parent / "startup"
"""What every process of a run imports first."""
TIMEOUT = 240
"""Seconds; below the limit of a test, so that it is the run that is stopped, with all it has started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A process that has ended.

    Attributes:
        status: Its exit status; a signal is negative.
        output: stdout and stderr together.
        peak_bytes: Peak of its resident memory. What it started does not count.
    """

    status: int
    output: str
    peak_bytes: int


class Runs:
    """Runs commands in one folder: one thread, no network, caches in that folder, no allocator preloaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def python(self, *arguments: object, **environment: str) -> Done:
        """`python ARGUMENTS`, with the Python of the stack."""
        return self.command(sys.executable, *arguments, **environment)

    def command(self, *words: object, **environment: str) -> Done:
        """Any command. It gets `TIMEOUT` seconds, then it is ended with all of its children."""
        inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        fixed["PYTHONFAULTHANDLER"] = "1"
        caches = {"HF_HOME": str(self.folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        given = {**inherited, **fixed, **caches, **environment}
        given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STARTUP), given.get("PYTHONPATH")]))
        log = self.folder / "output.txt"
        with log.open("w+b") as file:
            process = subprocess.Popen(
                [*map(str, words)],
                cwd=self.folder,
                env=given,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            end = time.monotonic() + TIMEOUT
            # Not `process.wait`: only wait4 says how much memory this one process used.
            while not (waited := os.wait4(process.pid, os.WNOHANG))[0]:
                if time.monotonic() > end:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    raise AssertionError(f"no end after {TIMEOUT} s: {tail(log.read_text(errors='replace'))}")
                time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(waited[1])
        output = log.read_text(errors="replace")
        return Done(status=process.returncode, output=output, peak_bytes=waited[2].ru_maxrss * 1024)

    def memfit(self, options: list[object], *command: object, **environment: str) -> Done:
        """`memfit run OPTIONS -- COMMAND`."""
        return self.python("-m", "memfit", "run", *options, "--", *command, **environment)

    def torchrun(self, num_ranks: int, *arguments: object, **environment: str) -> Done:
        """`torchrun --nproc-per-node NUM_RANKS ARGUMENTS`, with a port of its own."""
        ranks = ["--standalone", "--nproc-per-node", num_ranks]
        return self.python("-m", "torch.distributed.run", *ranks, *arguments, **environment)


def tail(output: str, lines: int = 60) -> str:
    """The end of an output, for the message of a test that fails."""
    return "\n".join(output.splitlines()[-lines:])


def history(folder: Path) -> list[dict[str, Any]]:
    """What a Trainer logged at each step, up to its last checkpoint in ``folder``: all digits, no times."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [{key: entry[key] for key in ("step", "loss", "grad_norm")} for entry in log if "loss" in entry]


def state(folder: Path) -> dict[str, bytes]:
    """The weights and the optimizer's state in a Trainer's checkpoints, by file: equal bytes are equal numbers."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("optimizer.pt")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


def assert_same_training(actual: Path, expected: Path) -> None:
    """Losses, gradient norms, weights and optimizer states of two Trainers are equal to the last digit."""
    assert history(actual) == history(expected)
    states = state(actual), state(expected)
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if states[0][name] != states[1][name]] == []
    assert any(name.endswith("optimizer.pt") for name in states[0])


def report(path: Path) -> dict[str, Any]:
    """The report that `memfit run --report FILE.json` wrote."""
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def assert_planned(summary: dict[str, Any], *, steps: int) -> None:
    """A plan held, every block of the last step was replayed, and more than nothing was recomputed."""
    assert summary["steps"] == steps
    assert summary["recomputed_bytes"] > 0
    assert summary["predicted_peak_bytes"] is not None
    assert {block["mode"] for block in summary["blocks"]} == {"replay"}
    assert all(block["recomputed_bytes"] is not None for block in summary["blocks"])
