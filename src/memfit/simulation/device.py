"""What a device leaves for tensors, and what a prediction for it leaves out."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from memfit import host
from memfit.hardware import Hardware
from memfit.simulation.results import Rehearsed
from memfit.units import parse_budget

CUDA_CONTEXT_BYTES = 600 * 2**20
"""Of a device's memory: what driver, context and kernels take before the first tensor."""
CUDA_WORKSPACE_BYTES = 72 * 2**20
"""cuBLAS's, for the thread of the forward and that of the backward (32 MiB each on Hopper), and cuDNN's."""
FIRST_STEP_BYTES = 40 * 2**20
"""On CPU: what a real step adds to a process that has its libraries: code that runs first, packed matrices, stacks."""
PROCESS_SPREAD_BYTES = 32 * 2**20
"""On CPU: by how much more a process may hold than expected."""
SLACK = {"cuda": (0.02, 0.06), "cpu": (0.03, 0.08), "mps": (0.05, 0.15)}
"""What an allocator holds beside tensors, as a part of them: expected, and at most."""

UNHELD_SLACK = (0.18, 0.4)
"""On CPU where no tcmalloc can be had, whose limit holds a budget: glibc keeps what is freed."""


def slack(entry: Hardware) -> tuple[float, float]:
    """What the allocator of a device holds beside tensors, as a part of them: expected, and at most."""
    return UNHELD_SLACK if entry.backend == "cpu" and not takes_limit() else SLACK[entry.backend]


def takes_limit() -> bool:
    """Whether the allocator of a training process on CPU keeps a budget by itself."""
    return host.allocator() == "tcmalloc" or (host.may_preload() and host.find_allocator() is not None)


def usable_bytes(entry: Hardware) -> int:
    """What a device has for one process."""
    return entry.memory_bytes - (CUDA_CONTEXT_BYTES if entry.backend == "cuda" else 0)


def limit_of(budget: int | float | str | None, entry: Hardware) -> int | str:
    """Bytes that a peak is to fit into, or ``min``; by default what the device has."""
    parsed = parse_budget(budget)
    if parsed.kind in ("none", "auto"):
        return usable_bytes(entry)
    if parsed.kind == "percent":
        return int(entry.memory_bytes * (parsed.value or 0) / 100)
    return "min" if parsed.kind == "min" else int(parsed.value or 0)


_processes: list[int] = []


def process_bytes(tensors: Iterable[torch.Tensor] = ()) -> int:
    """What a training process holds beside tensors on CPU, judged by this one once it has the libraries.

    Of several readings the smallest: later ones have what predictions left behind.

    Args:
        tensors: Real ones that this process holds and a prediction counts itself.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    _processes.append(max(0, host.resident_bytes() - sum(storages.values())))
    _processes[:] = [min(_processes)]
    return _processes[0] + FIRST_STEP_BYTES


def not_counted(entry: Hardware, rehearsed: Rehearsed) -> tuple[str, ...]:
    """As sentences."""
    sentences = ["Data loading, evaluation, saving and logging."]
    if entry.backend == "cuda":
        sentences.append(
            "Compiled or third-party kernels (torch.compile, Liger, Unsloth): attention and dropout are torch's own."
        )
        sentences.append("Numbers for CUDA come from CUDA's operators without a GPU; no run on one confirms them yet.")
    if entry.backend == "mps":
        sentences.append("What Metal's kernels keep differs from CPU's, which is what is counted.")
    if rehearsed.looked_at_values:
        sentences.append(
            "What depends on values: tensors have none here. The model asked for some, and was told false, zero or 1.0."
        )
    return tuple(sentences)
