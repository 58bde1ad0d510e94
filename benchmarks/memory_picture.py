"""The picture of docs/memory.md: what one real training step holds, op by op, and the numbers beside it.

python -m benchmarks.memory_picture           # writes docs/memory.svg, prints the table; CPU, under a minute
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from memfit import configurations, host
from memfit.simulation import tasks
from memfit.simulation.ledger import Ledger
from memfit.units import format_bytes

MODEL, LAYERS, BATCH, LENGTH = "smollm2-135m", 6, 4, 256
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "memory.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 440, 62, 190, 34, 44
_AREAS = (
    ("static", "weights, optimizer state"),
    ("gradients", "gradients"),
    ("saved", "saved for the backward"),
    ("rest", "all other tensors"),
)
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 12px; fill: #59636e }
.static { fill: #8c959f } .gradients { fill: #bc4c00 } .saved { fill: #0969da } .rest { fill: #a475f9 }
.line { fill: none; stroke: #1f2328; stroke-width: 2 } .axis { stroke: #8c959f; stroke-width: 1 }
.dash { stroke-dasharray: 5 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 } .line { stroke: #f0f6fc }
  .static { fill: #656c76 } .gradients { fill: #db6d28 } .saved { fill: #388bfd } .rest { fill: #986ee2 }
}
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes after one op.

    Attributes:
        allocated: What all tensors take.
        gradients: Of which gradients.
        saved: Of which autograd keeps for the backward, parameters left out.
        resident: The resident set.
    """

    allocated: int
    gradients: int
    saved: int
    resident: int


class Watch(Ledger):  # type: ignore[no-untyped-call]
    """Samples after every op of a real step."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        super().__init__(lambda *_: 0.0)
        self.samples: list[Sample] = []
        self._parameters = parameters
        self._own = {p.untyped_storage()._cdata for p in parameters}
        self._saved: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """What autograd keeps counts until its storage is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._own and key not in self._saved:
            self._saved[key] = storage.nbytes()
            weakref.finalize(storage, self._saved.pop, key, None)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        gradients = {p.grad.untyped_storage()._cdata: p.grad.nbytes for p in self._parameters if p.grad is not None}
        # A gradient may be a tensor that autograd had saved.
        saved = sum(size for key, size in self._saved.items() if key not in gradients)
        self.samples.append(Sample(self.now, sum(gradients.values()), saved, host.resident_bytes()))
        return out


def record() -> tuple[list[Sample], dict[str, int], int]:
    """One step after three others: its samples, where its phases begin, and what is held throughout."""
    torch.manual_seed(0)
    config = configurations.with_layers(configurations.load(MODEL), LAYERS)
    job = tasks.build(
        config, task="causal-lm", batch_size=BATCH, length=LENGTH, precision="fp32", device=torch.device("cpu")
    )
    parameters = list(job.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=False)
    for _ in range(3):
        job.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    host.release()
    watch = Watch(parameters)
    watch.see([*parameters, *job.model.buffers(), *job.batch.values()])
    watch.see(value for state in optimizer.state.values() for value in state.values())
    static = watch.now
    phases = {"forward and loss": 0}
    with watch:
        with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor):
            loss = job.loss()
        phases["backward"] = len(watch.samples)
        loss.backward()
        del loss
        phases["optimizer"] = len(watch.samples)
        optimizer.step()
        optimizer.zero_grad()
        phases["end"] = len(watch.samples)
    return watch.samples, phases, static


def thinned(samples: Sequence[Sample], phases: dict[str, int]) -> tuple[list[Sample], dict[str, int]]:
    """One sample for every few ops: that with the most allocated."""
    each = max(1, len(samples) // 300)
    kept = [max(samples[i : i + each], key=lambda s: s.allocated) for i in range(0, len(samples), each)]
    return kept, {name: number // each for name, number in phases.items()}


def draw(samples: Sequence[Sample], phases: dict[str, int], static: int) -> str:
    """An SVG: stacked areas of what tensors take, the resident set as a line, the peaks of both."""
    highest = max(sample.resident for sample in samples) * 1.06

    def x(number: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * number / len(samples)

    def y(size: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * size / highest

    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    lines.append("<title>What a training step holds</title>")
    lines.append(f"<style>{_STYLE}</style>")
    below = [0] * len(samples)
    for name, _ in _AREAS:
        above = [low + _part(sample, static, name) for low, sample in zip(below, samples, strict=True)]
        points = [f"{x(i):.1f},{y(size):.1f}" for i, size in enumerate(above)]
        points += [f"{x(i):.1f},{y(size):.1f}" for i, size in reversed(list(enumerate(below)))]
        lines.append(f'<polygon class="{name}" points="{" ".join(points)}"/>')
        below = above
    resident = " ".join(f"{x(i):.1f},{y(sample.resident):.1f}" for i, sample in enumerate(samples))
    lines.append(f'<polyline class="line" points="{resident}"/>')
    floor = HEIGHT - BOTTOM
    lines.append(f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{WIDTH - RIGHT}" y2="{floor}"/>')
    step = 2**28
    for size in range(0, int(highest), step):
        lines.append(f'<text class="small" x="{LEFT - 8}" y="{y(size) + 4:.1f}" text-anchor="end">')
        lines.append(f"{size / 2**30:.2f}</text>")
    lines.append(f'<text class="small" x="{LEFT - 8}" y="{TOP - 16}" text-anchor="end">GiB</text>')
    names = list(phases)
    for name, following in pairwise(names):
        begin, end = phases[name], phases[following]
        lines.append(f'<line class="axis dash" x1="{x(end):.1f}" y1="{TOP}" x2="{x(end):.1f}" y2="{floor + 6}"/>')
        lines.append(f'<text x="{x((begin + end) / 2):.1f}" y="{floor + 22}" text-anchor="middle">{name}</text>')
    for label, sizes in (
        ("peak, resident", [s.resident for s in samples]),
        ("peak, allocated", [s.allocated for s in samples]),
    ):
        top = max(sizes)
        at = sizes.index(top)
        lines.append(f'<circle cx="{x(at):.1f}" cy="{y(top):.1f}" r="4" class="line"/>')
        line = (
            f'<line class="axis dash" x1="{x(at):.1f}" y1="{y(top):.1f}" x2="{WIDTH - RIGHT + 6}" y2="{y(top):.1f}"/>'
        )
        lines.append(line)
        lines.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y(top) + 4:.1f}">{label}</text>')
    place = HEIGHT - BOTTOM - 14
    for name, label in _AREAS:
        lines.append(f'<rect class="{name}" x="{WIDTH - RIGHT + 10}" y="{place - 10}" width="12" height="12"/>')
        lines.append(f'<text class="small" x="{WIDTH - RIGHT + 27}" y="{place}">{label}</text>')
        place -= 20
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _part(sample: Sample, static: int, name: str) -> int:
    if name == "static":
        return static
    if name == "rest":
        return max(0, sample.allocated - static - sample.gradients - sample.saved)
    return int(getattr(sample, name))


def main() -> None:
    """Record, draw, print."""
    library = host.preload_candidate()
    if library is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "LD_PRELOAD": library})
    torch.set_num_threads(1)
    samples, phases, static = record()
    PICTURE.write_text(draw(*thinned(samples, phases), static), encoding="utf-8")
    top = max(samples, key=lambda sample: sample.allocated)
    for label, size in (
        ("weights, optimizer state", static),
        ("gradients, at most", max(sample.gradients for sample in samples)),
        ("saved, at most", max(sample.saved for sample in samples)),
        ("allocated, peak", top.allocated),
        ("resident, peak", max(sample.resident for sample in samples)),
        ("resident, before the step", samples[0].resident),
        ("resident, after the step", samples[-1].resident),
        ("allocated, after the step", samples[-1].allocated),
    ):
        print(f"{label:<28}{format_bytes(size):>10}")
    peak = max(range(len(samples)), key=lambda i: samples[i].allocated)
    print(f"the peak of what is allocated is op {peak} of {len(samples)}; phases begin at {phases}")


if __name__ == "__main__":
    main()
