"""Where a number comes from: command, hardware, versions and date, kept beside every result."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from memfit import host

_PACKAGES = ("memfit", "torch", "transformers", "peft", "highspy", "numpy")


def origin(command: str, device: str) -> dict[str, Any]:
    """The conditions of a measurement, as JSON.

    Args:
        command: As it was typed.
        device: Such as ``cpu`` or ``cuda``.
    """
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": host.ram_bytes(),
    }
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
        machine["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory
    may_load = device == "cpu" and os.environ.get("MEMFIT_ALLOCATOR") != "system"
    library = host.find_allocator() if may_load else None
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "hardware": machine,
        "system": f"{platform.system()} {platform.release()}",
        "allocator": Path(library).name if library else None,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


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


__all__ = ["origin"]
