"""Two devices that are not there: they compute on the CPU, and count what their tensors take.

A device has to be known to torch before its first backward, and stays known: what uses them has a process of its own.
"""

import os
import subprocess
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from memfit import memory, slack

FIRST, SECOND = "pretended:0", "pretended:1"


def build(library: Path) -> None:
    """Compile the devices: 20 seconds."""
    source = Path(__file__).with_suffix(".cpp")
    made = library.with_suffix(f".{os.getpid()}")
    paths = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
    flags = [
        "-shared",
        "-fPIC",
        "-O1",
        "-std=c++20",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
    ]
    command = ["g++", *flags, *paths, str(source), "-o", str(made), "-lc10", "-ltorch_cpu", "-ltorch"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    made.replace(library)  # whole or not at all: other workers may build it too


class PretendedMeter(memory.Meter):
    """Reads the counters."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        return torch.ops.pretended.allocated(self.device.index)

    def peak(self) -> int:
        return torch.ops.pretended.highest(self.device.index)

    def reset_peak(self) -> None:
        torch.ops.pretended.reset(self.device.index)

    allocated, allocated_peak = now, peak

    def release(self) -> None: ...

    def total(self) -> int:
        return 2**34

    def free(self) -> int:
        return self.total() - self.now()

    def outside(self) -> int:
        return 0


def load(library: str) -> None:
    """Make the devices known to torch, and to Memfit."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("pretended")
    module = types.ModuleType("torch.pretended")
    module.device_count = lambda: 2
    module.current_device = lambda: 0
    module.is_available = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.default_generators = [torch.ops.pretended.generator(index) for index in (0, 1)]
    torch._register_device_module("pretended", module)
    memory._METERS["pretended"] = PretendedMeter
    slack.FLOOR = 0  # for libraries that these devices do not have, and more than the models here
