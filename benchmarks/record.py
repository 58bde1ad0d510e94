"""Where a number comes from: command, hardware, versions and date, kept beside every result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memfit import origins

RESULTS = Path(__file__).resolve().parent / "results"


def origin(module: str, arguments: list[str], *, device: str) -> dict[str, Any]:
    """The conditions of a measurement, as JSON.

    Args:
        module: What was run, such as ``benchmarks.step``.
        arguments: Its command line.
        device: ``cpu`` or ``cuda``.
    """
    return origins.origin(" ".join(["python", "-m", module, *arguments]), device)


def write(name: str, data: dict[str, Any], *, folder: Path = RESULTS) -> Path:
    """Write a result and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
