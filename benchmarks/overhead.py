"""What Memfit costs when it has nothing to do, and per tensor and block call when it has.

Two sections. The first lets whole steps of the three shapes take turns: plain, `budget=None` (only measure), and a plan
that recomputes nothing because the budget is large. The second uses blocks whose tensors are so small that arithmetic
does not count, in one process: the slope over the number of tensors per block is the cost of a tensor, the slope over
the number of blocks, less their tensors, that of a block call, and what is left that of a step.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.turns import Track, Worker, WorkerError, interleave

FEW_BLOCKS, MANY_BLOCKS = 8, 40
FEW, MANY = 8, 64
# More than any machine has: nothing has to be recomputed.
LARGE = 1 << 45


def measure(shapes: Sequence[str], *, device: str, repetitions: int = 11) -> dict[str, Any]:
    """Both sections as JSON."""
    steps: list[dict[str, Any]] = []
    for case in shapes:
        print(f"{case}: overhead", file=sys.stderr, flush=True)
        steps += whole_steps(case, device=device, repetitions=repetitions)
    print("microbenchmarks", file=sys.stderr, flush=True)
    return {"steps": steps, "micro": micro(device)}


def whole_steps(case: str, *, device: str, repetitions: int) -> list[dict[str, Any]]:
    """Ratios of whole steps that change nothing."""
    rows: list[dict[str, Any]] = []
    with Worker(case, "plain", device=device) as plain:
        plain.steps(2)
        for what, budget in (("budget=None", None), ("save everything", LARGE)):
            row: dict[str, Any] = {"case": case, "what": what}
            try:
                with Worker(case, "memfit", device=device, budget=budget) as fitted:
                    fitted.steps(4)
                    base, track = interleave([plain, fitted], repetitions=repetitions, steps=1)
                    row |= _ratios(base, track) | {"summary": fitted.ask("summary")}
            except WorkerError as error:
                row["error"] = str(error)
            rows.append(row)
    return rows


def _ratios(base: Track, track: Track) -> dict[str, Any]:
    return {"ratio": track.ratio(base), "cpu_ratio": track.cpu_ratio(base), "seconds": track.seconds}


class _Block(nn.Module):
    """Saves ``length`` tiny tensors, each the input of a sine."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight
        for _ in range(self.length):
            x = torch.sin(x)
        return x


class _Chain(nn.Module):
    def __init__(self, num_blocks: int, length: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(length) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def _seconds(step: Callable[[], None], *, device: str, rounds: int = 60, warmup: int = 8) -> float:
    """Mean time of a step without the slowest tenth: the canary and the graph check do not run alike in every step.

    On CPU it is the process's CPU time: everything runs on one thread, and a busy neighbour does not count.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: list[float] = []
    for index in range(rounds + warmup):
        started = clock()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        if index >= warmup:
            times.append(clock() - started)
    return statistics.fmean(sorted(times)[: len(times) - len(times) // 10])


def _step_seconds(num_blocks: int, length: int, device: str, options: dict[str, Any] | None) -> float:
    """Mean step time of a chain; ``options`` of `memfit.fit`, ``None`` for plain."""
    torch.manual_seed(0)
    model = _Chain(num_blocks, length).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.rand(64, device=device)

    def step() -> None:
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    if options is None:
        return _seconds(step, device=device)
    import memfit

    handle = memfit.fit(model, optimizer=optimizer, blocks=["_Block"], **options)
    try:
        return _seconds(step, device=device)
    finally:
        handle.remove()


def _sine_seconds(device: str) -> float:
    """Time of one of the ops that a recipe runs again: not Memfit's work."""
    x = torch.rand(64, device=device)

    def run() -> None:
        with torch.no_grad():
            y = x
            for _ in range(MANY):
                y = torch.sin(y)

    return _seconds(run, device=device) / MANY


def micro(device: str) -> list[dict[str, Any]]:
    """Microseconds per saved tensor, per dropped tensor and per block call, above what plain autograd needs."""
    plans: dict[str, dict[str, Any]] = {
        "budget=None": {"budget": None},
        "saved": {"budget": LARGE},
        "dropped": {"policy": "full"},
    }
    chains = ((FEW_BLOCKS, FEW), (FEW_BLOCKS, MANY), (MANY_BLOCKS, FEW))
    plain = {chain: _step_seconds(*chain, device, None) for chain in chains}
    rows: list[dict[str, Any]] = []
    sine = _sine_seconds(device)
    for name, options in plans.items():
        try:
            extra = {chain: _step_seconds(*chain, device, options) - plain[chain] for chain in chains}
        except Exception as error:  # the other rows are worth having
            rows.append({"what": name, "error": f"{type(error).__name__}: {error}"})
            continue
        few, long, wide = (extra[chain] for chain in chains)
        tensor = (long - few) / FEW_BLOCKS / (MANY - FEW)
        block = (wide - few) / (MANY_BLOCKS - FEW_BLOCKS)
        call, step = block - FEW * tensor, few - FEW_BLOCKS * block
        if name == "budget=None":
            rows.append({"what": "budget=None, per step", "microseconds": 1e6 * few, "limit": None})
            continue
        if name == "dropped":
            rows.append({"what": "the op itself, run again", "microseconds": 1e6 * sine, "limit": None})
            tensor -= sine
        rows.append(
            {"what": f"per {name} tensor", "microseconds": 1e6 * tensor, "limit": {"saved": 2, "dropped": 6}[name]}
        )
        rows.append({"what": f"per block call, all {name}", "microseconds": 1e6 * call, "limit": 15})
        rows.append({"what": f"per step, all {name}", "microseconds": 1e6 * step, "limit": None})
    return rows
