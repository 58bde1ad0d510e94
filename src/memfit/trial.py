"""A real training step with random weights in a process of its own, measured: what a prediction is compared with.

`measure` starts the process, which runs this module, and reads what it found. Files carry both: models print what they
like.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from memfit import configurations, host
from memfit.autopilot import fit
from memfit.cells import Measured
from memfit.errors import MemfitError, ModelError
from memfit.heap import heap
from memfit.keeper import MARGIN_SHARE
from memfit.plans import Plan
from memfit.signature import tensors_in
from memfit.simulation import tasks
from memfit.simulation.optimizers import make_optimizer

_TRIAL, _FOUND, _PLAN = "trial.json", "found.json", "plan.json"
_WARM_STEPS = {False: 2, True: 5}
"""Optimizer state is born in the first one, a plan is verified by the fifth."""
_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A step to run.

    Attributes:
        model: As `configurations.load` takes it.
        layers: That it is cut to; ``None``: all.
        trust_remote_code: As for `configurations.load`.
        options: As `tasks.build` takes them.
        optimizer: Of torch.
        accumulate: Micro-batches of an optimizer step.
        chunked_loss: Whether the loss is computed in chunks.
        device: ``cpu`` or ``cuda``.
        planned: Whether it follows a plan.
        budget: Bytes that the heap is held to, where it takes a limit.
    """

    model: str
    layers: int | None
    trust_remote_code: bool
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    accumulate: int = 1
    chunked_loss: bool = False
    device: str = "cpu"
    planned: bool = False
    budget: int = 0


def measure(trial: Trial, plan: Plan | None = None) -> Measured:
    """Run a step in a process of its own, under tcmalloc where `memfit run` would have it.

    Raises:
        ModelError: The process failed; the message has its last words.
    """
    with tempfile.TemporaryDirectory(prefix="memfit-") as folder:
        place = Path(folder)
        if plan is not None:
            plan.save(place / _PLAN)
        (place / _TRIAL).write_text(json.dumps({**asdict(trial), "planned": plan is not None}), encoding="utf-8")
        environment = dict(os.environ)
        library = host.find_allocator() if trial.device == "cpu" and host.may_preload() else None
        if library is not None:
            environment["LD_PRELOAD"] = " ".join(filter(None, (library, os.environ.get("LD_PRELOAD"))))
        done = subprocess.run(
            [sys.executable, "-m", "memfit.trial", folder],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        found = place / _FOUND
        if done.returncode == 0 and found.exists():
            return Measured(**json.loads(found.read_text(encoding="utf-8")))
    words = [line for line in done.stderr.splitlines() if line.strip()]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    raise ModelError(f"The measured step ended with {how}: {words[-1][:300] if words else 'it said nothing'}")


class _Stepper:
    """A model that trains."""

    def __init__(self, trial: Trial, plan: Plan | None) -> None:
        config = configurations.load(trial.model, trust_remote_code=trial.trust_remote_code)
        if trial.layers is not None:
            config = configurations.with_layers(config, trial.layers)
        torch.manual_seed(0)
        self._job = tasks.build(config, **trial.options, device=torch.device(trial.device))
        model = self._job.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(trial.optimizer, cuda=trial.device == "cuda")(parameters)
        self._accumulate = trial.accumulate
        self._handle = None
        if plan is not None or trial.chunked_loss:
            # The plan that saves everything is no plan for a loss in chunks: without one `fit` only measures.
            self._handle = fit(model, plan=plan, optimizer=self._optimizer, chunked_loss=trial.chunked_loss)

    def step(self) -> None:
        """All micro-batches, and the optimizer's step."""
        for _ in range(self._accumulate):
            loss = self._job.loss() / self._accumulate
            torch.autograd.backward(loss)
            del loss
        self._optimizer.step()
        self._optimizer.zero_grad()

    def hold(self, budget: int) -> bool:
        """Hold the process to a budget from now on, as a plan for it does; whether there is a way."""
        host.release()
        limited = heap()
        if limited is not None:
            limited.settle()
        if self._handle is not None and self._handle._hold(budget):
            return True
        if limited is not None:
            limited.limit(budget - int(MARGIN_SHARE * budget))
        return limited is not None

    def held_bytes(self) -> int:
        """What tensors take between two steps."""
        model = self._job.model
        tensors = [*model.parameters(), *model.buffers(), *tensors_in(self._job.batch)]
        tensors += [p.grad for p in model.parameters() if p.grad is not None]
        for state in self._optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _on_cpu(stepper: _Stepper, budget: int, *, planned: bool) -> Measured:
    """The resident set first, undisturbed; then held to the budget; then tensors, as torch's profiler counts them."""
    host.release()  # what steps that record and verify have left
    beside = host.resident_bytes() - stepper.held_bytes()
    free_peak, free_seconds, resets = _resident_peak(stepper)
    peak, seconds = free_peak, free_seconds
    held = stepper.hold(budget)
    if held:
        peak, seconds, _ = _resident_peak(stepper)
    return Measured(
        peak_bytes=peak,
        unheld_peak_bytes=free_peak,
        tensor_bytes=min(_counted(stepper) for _ in range(2 if planned else 1)),
        step_seconds=seconds,
        unheld_step_seconds=free_seconds,
        beside_bytes=max(0, beside),
        allocator=host.allocator(),
        held=held,
        peak_of_step=resets,
    )


def _resident_peak(stepper: _Stepper) -> tuple[int, float, bool]:
    """The highest resident set of some steps, the seconds of the fastest, and whether it is of these steps."""
    peaks, seconds = [], []
    resets = True
    for _ in range(_STEPS):
        resets = host.reset_highest_resident() and resets
        seconds.append(_seconds(stepper.step))
        peaks.append(host.highest_resident_bytes())
    return max(peaks), min(seconds), resets


def _counted(stepper: _Stepper) -> int:
    """The most that tensors hold in a step; a check of recomputed values, every few steps, may add a few."""
    before = stepper.held_bytes()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        stepper.step()
    events = profile.profiler.kineto_results.events()
    found = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return before + int(max(itertools.accumulate((size for _, size in found), initial=0)))


def _on_cuda(stepper: _Stepper) -> Measured:
    reserved, allocated, seconds = [], [], []

    def step() -> None:
        stepper.step()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what steps that record and verify have left
    for _ in range(_STEPS):
        torch.cuda.reset_peak_memory_stats()
        seconds.append(_seconds(step))
        reserved.append(torch.cuda.max_memory_reserved())
        allocated.append(torch.cuda.max_memory_allocated())
    return Measured(
        peak_bytes=max(reserved),
        unheld_peak_bytes=max(reserved),
        tensor_bytes=max(allocated),
        step_seconds=min(seconds),
        unheld_step_seconds=min(seconds),
        beside_bytes=max(0, torch.cuda.memory_reserved() - torch.cuda.memory_allocated()),
        allocator="caching",
        held=False,
        peak_of_step=True,
    )


def _seconds(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _run(folder: Path) -> None:
    trial = Trial(**json.loads((folder / _TRIAL).read_text(encoding="utf-8")))
    plan = Plan.load(folder / _PLAN) if trial.planned else None
    torch.set_flush_denormal(True)  # random weights learn one batch: gradients vanish, and are slow to compute with
    stepper = _Stepper(trial, plan)
    for _ in range(_WARM_STEPS[trial.planned]):
        stepper.step()
    found = _on_cuda(stepper) if trial.device == "cuda" else _on_cpu(stepper, trial.budget, planned=trial.planned)
    (folder / _FOUND).write_text(json.dumps(asdict(found)), encoding="utf-8")


def main(arguments: Iterable[str]) -> int:
    """Run the trial of a folder, as `measure` wrote it; the exit status."""
    (folder,) = arguments
    with contextlib.redirect_stdout(sys.stderr):
        try:
            _run(Path(folder))
        except MemfitError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
