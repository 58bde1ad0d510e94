"""Predictions against real steps on this machine: the cells of a grid, one process each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from memfit import configurations, hardware, host
from memfit.blocks import find_blocks
from memfit.cells import PLANS, TRAINS, Cell
from memfit.errors import CalibrationError, ModelError, UsageError
from memfit.forecast import Forecast
from memfit.hardware import Hardware
from memfit.plans import Plan
from memfit.simulation import tasks
from memfit.simulation.device import CUDA_WORKSPACE_BYTES, takes_limit
from memfit.simulation.fakes import fake_tensors
from memfit.solver.planner import switched
from memfit.trial import Trial, measure
from memfit.units import format_bytes

DEFAULT_RANK = 8
"""Of adapters, where none is given."""
_FREE_SHARE = 0.9
_OPTIMIZERS = ("adamw_8bit", "adafactor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is to be compared: every combination.

    Attributes:
        model: As `configurations.load` takes it.
        layers: That it is cut to; ``None``: all.
        batches, lengths: Rows and tokens of a batch.
        trains: Of `TRAINS`.
        plans: Of `PLANS`.
        entry: Whose rates the prediction takes; the step runs on its kind of device here.
        lora: Rank of the adapters.
        freeze: Parts of parameter names, for ``frozen``; by default the embeddings and the lower half of the blocks.
        options: Further ones of `tasks.build`.
        task: One of `tasks.TASKS`; by default what the configuration is for.
        optimizer, accumulate, chunked_loss: As for `simulate`.
        trust_remote_code: As for `configurations.load`.
    """

    model: str
    layers: int | None = None
    batches: Sequence[int] = (1,)
    lengths: Sequence[int] = (512,)
    trains: Sequence[str] = TRAINS
    plans: Sequence[str] = ("plain", "full")
    entry: Hardware
    lora: int = DEFAULT_RANK
    freeze: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    optimizer: str = "adamw"
    accumulate: int = 1
    chunked_loss: bool = False
    trust_remote_code: bool = False


def this_machine() -> Hardware:
    """The device that a step here would run on: as calibrated, else by its name.

    Raises:
        UsageError: A GPU that Memfit does not know, and that was not calibrated.
    """
    backend = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = hardware.find("here")
        if found.backend == backend:
            return found
    except (UsageError, CalibrationError):
        pass
    return hardware.find(torch.cuda.get_device_name() if backend == "cuda" else "cpu")


def run(grid: Grid) -> Iterator[Cell]:
    """Predict and measure every cell; what would not fit into what is free here is not tried.

    Raises:
        UsageError: The grid cannot be run here.
        ModelError: The model cannot be predicted.
    """
    _check(grid)
    config = configurations.load(grid.model, trust_remote_code=grid.trust_remote_code)
    if grid.layers is not None:
        config = configurations.with_layers(config, grid.layers)
    task = grid.task if grid.task is not None else tasks.task_of(config)
    # cuBLAS takes its workspace from torch's allocator.
    libraries = CUDA_WORKSPACE_BYTES if grid.entry.backend == "cuda" else 0
    for batch in grid.batches:
        for length in grid.lengths:
            for trains in grid.trains:
                options = dict(grid.options)
                if trains == "lora":
                    options["lora"] = grid.lora
                elif trains == "frozen":
                    options["freeze"] = list(grid.freeze) or _lower_half(config, task, options)
                forecast = Forecast(
                    config,
                    device=grid.entry,
                    optimizer=grid.optimizer,
                    accumulate=grid.accumulate,
                    batch_size=batch,
                    length=length,
                    task=task,
                    chunked_loss=grid.chunked_loss,
                    compares=False,
                    **options,
                )
                trial = Trial(
                    model=grid.model,
                    layers=grid.layers,
                    trust_remote_code=grid.trust_remote_code,
                    options={**options, "task": task, "batch_size": batch, "length": length},
                    optimizer=grid.optimizer,
                    accumulate=grid.accumulate,
                    chunked_loss=grid.chunked_loss,
                    device=grid.entry.backend,
                )
                for name in grid.plans:
                    plan = _plan(forecast, name)
                    prediction = forecast.of(plan)
                    cell = Cell(
                        model=grid.model,
                        batch=batch,
                        length=length,
                        trains=trains,
                        plan=name,
                        peak=prediction.peak,
                        tensor_bytes=plan.predicted_peak_bytes + libraries,
                        step_seconds=prediction.step_seconds,
                    )
                    budget = prediction.peak.high
                    alone = name == "plain" and (grid.entry.backend != "cpu" or takes_limit())
                    yield _measured(cell, replace(trial, budget=budget), None if alone else plan)


def _check(grid: Grid) -> None:
    for name, chosen, known in (("train", grid.trains, TRAINS), ("plans", grid.plans, PLANS)):
        for word in chosen:
            if word not in known:
                raise UsageError(f"`--{name}` does not know `{word}`. Known are {', '.join(f'`{k}`' for k in known)}.")
    if grid.optimizer.lower().replace("-", "_") in _OPTIMIZERS:
        raise UsageError(f"`{grid.optimizer}` is not torch's: only torch's optimizers are run. Write `adamw` or `sgd`.")
    if grid.entry.backend not in ("cpu", "cuda"):
        raise UsageError(f"No step is measured on `{grid.entry.backend}`: only on `cpu` and `cuda`.")
    if grid.entry.backend == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"`{grid.entry.name}` is a GPU, and torch finds none here. Leave `--gpu` out, or write `cpu`.")


def _plan(forecast: Forecast, name: str) -> Plan:
    if name in ("plain", "full"):
        return switched(forecast.profile, policy=name, **forecast.named)
    smallest = forecast.solve("min")
    if name == "min":
        return smallest
    return forecast.solve((smallest.predicted_peak_bytes + smallest.plain_peak_bytes) // 2)


def _lower_half(config: Any, task: str, options: dict[str, Any]) -> list[str]:
    """Names of the embeddings, and of the blocks below the middle."""
    with fake_tensors():
        model = tasks.build(config, task=task, batch_size=1, length=8, **options).model
        names = [f"{name}." for name, _ in find_blocks(model)]
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        return [f"{name}." for name, part in model.named_modules() if part is embeddings] + names[: len(names) // 2]


def _measured(cell: Cell, trial: Trial, plan: Plan | None) -> Cell:
    free = host.free_bytes() if trial.device == "cpu" else torch.cuda.mem_get_info()[0]
    if cell.peak.high > _FREE_SHARE * free:
        return replace(cell, reason=f"needs {format_bytes(cell.peak.high)}, {format_bytes(free)} are free")
    try:
        return replace(cell, measured=measure(trial, plan))
    except ModelError as error:
        return replace(cell, reason=str(error), failed=True)
