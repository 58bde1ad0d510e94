"""Show versions, devices and memory, and what Memfit will use."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from memfit import host
from memfit._version import __version__
from memfit.errors import CalibrationError
from memfit.hardware import load_record, record_path, save_record
from memfit.units import format_bytes, format_rate, format_seconds

EPILOG = """\
`--calibrate` stores what it measures in $XDG_CACHE_HOME/memfit/hardware.json, or in ~/.cache/memfit; plans for the
device `here` use it. Nothing else should run on the machine meanwhile.
"""

_PACKAGES = ("torch", "highspy", "transformers", "accelerate", "peft", "sentence-transformers", "deepspeed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `memfit doctor`."""
    parser.add_argument("--json", action="store_true", help="the same as JSON, raw bytes")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="first measure matrix products, attention, copies and the link to the host, and store that (under 30 s)",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Print what was found, after measuring if asked.

    Raises:
        CalibrationError: What was measured cannot be stored, or there is no torch to measure with.
    """
    if arguments.calibrate:
        _calibrate()
    facts = examine()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0


def examine() -> dict[str, Any]:
    """What this machine and this environment offer, as data that JSON takes. Bytes throughout."""
    library = host.find_allocator()
    facts: dict[str, Any] = {
        "memfit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "cpu": {
            "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "ram_bytes": host.ram_bytes(),
            "available_bytes": host.available_ram_bytes(),
            "cgroup_limit_bytes": host.cgroup_limit_bytes(),
            "usable_bytes": host.total_bytes(),
            "peak_can_be_reset": host.reset_highest_resident(),
            "allocator": host.allocator(),
            "tcmalloc": library,
        },
        "gpus": _gpus(),
        **_calibration(),
    }
    run_allocator = "tcmalloc" if host.preload_candidate() else host.allocator()
    facts["uses"] = {"device": "cuda" if facts["gpus"] else "cpu", "allocator_in_run": run_allocator}
    facts["advice"] = _advice(facts)
    return facts


def _calibrate() -> None:
    if _version("torch") is None:
        raise CalibrationError(str(record_path()), "torch is needed to measure: install it with `pip install torch`.")
    from memfit.calibration import calibrate

    record = calibrate(progress=lambda what: print(f"memfit: measuring {what}", file=sys.stderr))
    print(f"memfit: calibration written to {save_record(record)}", file=sys.stderr)


def _calibration() -> dict[str, Any]:
    """The record of the last calibration, and what is wrong with it where it cannot be read."""
    try:
        record = load_record()
    except CalibrationError as error:
        return {"calibration": None, "calibration_error": str(error)}
    return {"calibration": None if record is None else asdict(record), "calibration_error": None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    gpus: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "index": index,
                "name": torch.cuda.get_device_name(index),
                "total_bytes": total,
                "free_bytes": free,
                "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
            }
        )
    return gpus


def _advice(facts: dict[str, Any]) -> list[str]:
    cpu = facts["cpu"]
    advice: list[str] = []
    if "torch" not in facts["packages"]:
        advice.append("torch is not installed: install it with `pip install torch`.")
    if facts["uses"]["device"] == "cpu" and sys.platform.startswith("linux"):
        if os.environ.get("MEMFIT_ALLOCATOR") == "system":
            advice.append(
                "`MEMFIT_ALLOCATOR=system` keeps `memfit run` from using tcmalloc: unset it for tight budgets."
            )
        elif cpu["tcmalloc"] is None and cpu["allocator"] == "glibc":
            advice.append(
                "glibc keeps freed memory: install libtcmalloc-minimal4 (Debian, Ubuntu) or gperftools-libs (Fedora), "
                "and `memfit run` will use it."
            )
        elif cpu["allocator"] == "glibc":
            advice.append(
                f"`memfit run` starts scripts under tcmalloc; elsewhere set `LD_PRELOAD={cpu['tcmalloc']}` yourself."
            )
    record = facts["calibration"]
    if facts["calibration_error"] is not None:
        advice.append(facts["calibration_error"])
    elif record is not None and facts["gpus"] and record["device"] != facts["gpus"][0]["name"]:
        advice.append(f"The calibration is of {record['device']}: run `memfit doctor --calibrate` again.")
    if not cpu["peak_can_be_reset"]:
        advice.append(
            "The kernel does not reset the peak of the resident set here (/proc/self/clear_refs): "
            "measured peaks on CPU are lower bounds."
        )
    return advice


def render(facts: dict[str, Any]) -> str:
    """The facts as text."""
    cpu, uses = facts["cpu"], facts["uses"]
    limit = cpu["cgroup_limit_bytes"]
    packages = ", ".join(f"{name} {found}" for name, found in facts["packages"].items())
    rows = [
        ("memfit", f"{facts['memfit']}, Python {facts['python']}, {facts['platform']}"),
        ("packages", packages or "none of those that Memfit works with"),
        ("memory", f"{format_bytes(cpu['ram_bytes'])} RAM, {format_bytes(cpu['available_bytes'])} available"),
        ("cgroup", "no limit" if limit is None else f"limit {format_bytes(limit)}"),
        ("cores", str(cpu["num_cores"])),
        ("allocator", f"{cpu['allocator']} here; {uses['allocator_in_run']} in `memfit run`"),
        ("tcmalloc", cpu["tcmalloc"] or "not found"),
    ]
    for gpu in facts["gpus"]:
        memory = f"{format_bytes(gpu['total_bytes'])}, {format_bytes(gpu['free_bytes'])} free"
        rows.append((f"cuda:{gpu['index']}", f"{gpu['name']}, capability {gpu['capability']}, {memory}"))
    if not facts["gpus"]:
        rows.append(("gpu", "none that torch can use"))
    peak = "reserved bytes of the caching allocator" if uses["device"] == "cuda" else "resident set of the process"
    rows.append(("uses", f"{uses['device']}; a budget bounds the {peak}"))
    rows += _calibration_rows(facts["calibration"])
    rows += [("advice", advice) for advice in facts["advice"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _calibration_rows(record: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What was measured, or how to measure it."""
    if record is None:
        return [("calibrated", "no: `memfit doctor --calibrate` measures this machine in under 30 s")]
    hardware = record["hardware"]
    rates = hardware["matmul_flops_per_second"]
    attention = hardware["attention_efficiency"] * rates["bf16" if hardware["backend"] == "cuda" else "fp32"]
    matmul = ", ".join(f"{name} {format_rate(rate, 'FLOP')}" for name, rate in rates.items())
    copy = hardware["memory_bytes_per_second"]
    others = [
        f"copy {format_rate(copy, 'B')}",
        f"element-wise {format_rate(copy * hardware['elementwise_efficiency'], 'B')}",
        f"launch {format_seconds(hardware['launch_seconds'])}",
    ]
    if hardware["host_link_bytes_per_second"] is not None:
        others.insert(1, f"host link {format_rate(hardware['host_link_bytes_per_second'], 'B')}")
    threads = f"{record['num_threads']} {'thread' if record['num_threads'] == 1 else 'threads'}"
    return [
        ("calibrated", f"on {record['date']}, {record['device']}, {threads}, torch {record['torch']}"),
        ("measured", f"matmul {matmul}; attention {format_rate(attention, 'FLOP')}"),
        ("measured", ", ".join(others)),
    ]
