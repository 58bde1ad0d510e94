"""What every test needs: one thread, so that sums come out in one order, and a quiet, offline Hugging Face.

And what several modules share: processes of their own, a training script to run there, and no garbage collection.
"""

from __future__ import annotations

import os

# Nothing here may reach for the network, and a fork in a test must not warn about tokenizers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gc
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(32, 64), nn.Dropout(0.1), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(self.drop(nn.functional.gelu(self.up(x))))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def build():
    return Model(), torch.randn(2048, 32), lambda output, batch: (output - batch).square().mean()
"""
"""The start of a training script; `build` is what `memfit plan` wants. How it trains is for the test to add."""


class Shell:
    """Runs scripts in a folder of their own, with plain Python and under `memfit`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        # One thread: sums come out in one order.
        inherited["OMP_NUM_THREADS"] = "1"
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    def memfit(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "memfit", *arguments, **{"MEMFIT_ALLOCATOR": "system", **environment})

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.memfit("run", *arguments, **environment)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """What reference counting does not free stays: a cycle that holds tensors would hold them until chance frees it."""
    # torch's own first step imports much, and that leaves cycles.
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(model.parameters()).step()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def same_random_numbers() -> Iterator[None]:
    """Every test starts from the same random state, and none leaves a global switch behind."""
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
