"""Options that `run` and `plan` share: what to fit into."""

from __future__ import annotations

import argparse
import os
from typing import Any

from memfit.errors import UsageError
from memfit.units import parse_budget

POLICIES = ("full", "selective")


def add_budget(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add `--budget`, `--policy` and `--every-n-layers`, of which one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--budget",
        metavar="BYTES",
        help="peak memory of the process on its device: `6GiB`, `6.5GB`, `90%%`, `auto` or `min`; "
        "without any of these options Memfit saves everything and only measures",
    )
    group.add_argument("--policy", choices=POLICIES, help="one policy for every block, without a budget")
    group.add_argument(
        "--every-n-layers", type=int, metavar="N", help="recompute every N-th block whole, without a budget"
    )
    return group


def read_budget(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those options as keyword arguments of `fit` and `plan`, checked before torch is imported.

    Raises:
        BudgetError: The budget cannot be read.
        UsageError: `--every-n-layers` is below 1.
    """
    parse_budget(arguments.budget)
    chosen: dict[str, Any] = {}
    if arguments.budget is not None:
        chosen["budget"] = arguments.budget
    if arguments.policy is not None:
        chosen["policy"] = arguments.policy
    if arguments.every_n_layers is not None:
        if arguments.every_n_layers < 1:
            raise UsageError(f"`--every-n-layers {arguments.every_n_layers}` is below 1, which means every block.")
        chosen["every_n_layers"] = arguments.every_n_layers
    return chosen


def rank() -> int:
    """Which of the processes that `torchrun` has started this is; 0 where there is only one."""
    try:
        return int(os.environ.get("RANK", "0"))
    except ValueError:
        return 0
