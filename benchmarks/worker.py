"""One configuration in one process: it steps when it is told to, and says what that cost.

Commands come in as lines on stdin, answers go out as JSON lines on stdout. Several such processes take turns, so that a
machine's slow minute hits them alike, and none sees another's memory. The peak of a step is the highest resident set
that the kernel counted during it (CPU) or the caching allocator's (CUDA).
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any

import torch
from torch import nn

from benchmarks import cases, peers
from memfit import host
from memfit.solver.bound import overhead_bound


class Peak:
    """Highest memory since `reset`, in bytes."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def reset(self) -> None:
        """Forget what was."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif not host.reset_highest_resident():
            raise RuntimeError("The kernel does not reset VmHWM: peaks of single steps cannot be read here.")

    def read(self) -> dict[str, int]:
        """The highest value: the resident set, or reserved and allocated bytes."""
        if self._cuda:
            return {
                "peak_bytes": torch.cuda.max_memory_reserved(),
                "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
            }
        return {"peak_bytes": host.highest_resident_bytes()}


class SavedInBlocks:
    """Counts what a step saves inside blocks: each storage once, parameters and buffers free."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._depth = 0
        self._seen: dict[int, int] = {}

    def count(self, step: Any) -> int:
        """Run one step and return the bytes."""
        free = {t.untyped_storage().data_ptr() for t in [*self._model.parameters(), *self._model.buffers()]}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if self._depth and storage.data_ptr() not in free:
                self._seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = []
        for _, block in peers.blocks(self._model):
            hooks.append(block.register_forward_pre_hook(self._enter))
            hooks.append(block.register_forward_hook(self._leave))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step()
        for hook in hooks:
            hook.remove()
        return sum(self._seen.values())

    def _enter(self, *_: Any) -> None:
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1


class Stepper:
    """Trains one case under one peer."""

    def __init__(self, *, case: str, peer: str, device: str, budget: int | str | None, policy: str | None) -> None:
        self.device = device
        self.built = cases.find(case, device).build(device)
        self.handle = peers.apply(peer, self.built.model, optimizer=self.built.optimizer, budget=budget, policy=policy)
        self.batches = cases.batches(self.built, device)
        self.peak = Peak(device)

    def train(self) -> float:
        """One step; returns the loss."""
        batch = next(self.batches)
        loss = self.built.loss(self.built.model(**batch))
        torch.autograd.backward(loss)
        self.built.optimizer.step()
        self.built.optimizer.zero_grad()
        return float(loss.detach())

    def step(self) -> dict[str, Any]:
        """One step with its wall time, CPU time, peak and loss."""
        self.peak.reset()
        self._wait()
        cpu, wall = time.process_time(), time.perf_counter()
        loss = self.train()
        self._wait()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"seconds": wall, "cpu_seconds": cpu, "loss": loss, **self.peak.read()}

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def saved(self) -> dict[str, Any]:
        """Bytes that a plain step saves in blocks."""
        return {"saved_bytes": SavedInBlocks(self.built.model).count(self.train)}

    def release(self) -> dict[str, Any]:
        """Hand back what the allocator holds, so that idle workers are small."""
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        else:
            host.release()
        return {"resident_bytes": host.resident_bytes()}

    def summary(self) -> dict[str, Any]:
        """Memfit's own account, without its blocks; empty for the others."""
        if self.handle is None:
            return {}
        summary = dict(self.handle.summary())
        modes: dict[str, int] = {}
        for block in summary.pop("blocks", []):
            modes[block["mode"]] = modes.get(block["mode"], 0) + 1
        profile, budget = self.handle.profile, summary["budget_bytes"]
        bound = overhead_bound(profile, budget=budget) if profile is not None and budget is not None else None
        return {**summary, "modes": modes, "bound_recompute_seconds": bound}


def main() -> None:
    """Answer commands until stdin ends."""
    warnings.filterwarnings("ignore")
    config = json.loads(sys.argv[1])
    # Libraries may print: answers get the real stdout, everything else goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        stepper = Stepper(**config)
        answer({"ready": True, "allocator": host.allocator()})
        commands = {
            "step": stepper.step,
            "saved": stepper.saved,
            "release": stepper.release,
            "summary": stepper.summary,
        }
        for line in sys.stdin:
            answer(commands[line.strip()]())
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
