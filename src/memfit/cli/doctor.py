"""Show versions, devices and memory, and what Memfit will use."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from memfit import host
from memfit._version import __version__
from memfit.units import format_bytes

EPILOG = ""

_PACKAGES = ("torch", "highspy", "transformers", "accelerate", "peft", "sentence-transformers", "deepspeed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `memfit doctor`."""
    parser.add_argument("--json", action="store_true", help="the same as JSON, raw bytes")


def execute(arguments: argparse.Namespace) -> int:
    """Print what was found."""
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
    }
    run_allocator = "tcmalloc" if host.preload_candidate() else host.allocator()
    facts["uses"] = {"device": "cuda" if facts["gpus"] else "cpu", "allocator_in_run": run_allocator}
    facts["advice"] = _advice(facts)
    return facts


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
    rows += [("advice", advice) for advice in facts["advice"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
