"""Where a number comes from: command, hardware, versions and date, kept beside every result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from memfit import host

RESULTS = Path(__file__).resolve().parent / "results"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def origin(module: str, arguments: list[str], *, device: str) -> dict[str, Any]:
    """The conditions of a measurement, as JSON.

    Args:
        module: What was run, such as ``benchmarks.step``.
        arguments: Its command line.
        device: ``cpu`` or ``cuda``.
    """
    import torch

    hardware: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": host.ram_bytes(),
    }
    if device.startswith("cuda"):
        hardware["gpu"] = torch.cuda.get_device_name()
        hardware["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory
    library = host.find_allocator() if device == "cpu" else None
    return {
        "command": " ".join(["python", "-m", module, *arguments]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "hardware": hardware,
        "system": f"{platform.system()} {platform.release()}",
        "allocator": Path(library).name if library else None,
        "versions": {
            "python": sys.version.split()[0],
            **{name: _version(name) for name in ("memfit", "torch", "transformers", "highspy", "numpy")},
        },
    }


def write(name: str, data: dict[str, Any], *, folder: Path = RESULTS) -> Path:
    """Write a result and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
