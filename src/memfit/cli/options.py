"""Options that `run` and `plan` share: what to fit into."""

from __future__ import annotations

import argparse
import os
from typing import Any

from memfit.errors import UsageError
from memfit.units import parse_budgets

EXIT_INFEASIBLE = 3
POLICIES = ("full", "selective")
CHUNKED_LOSS: dict[str, bool | str] = {"on": True, "off": False, "auto": "auto"}


def add_budget(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add `--budget`, `--policy` and `--every-n-layers`, of which one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--budget",
        metavar="BYTES",
        help="peak memory of the process on its device: `6GiB`, `6.5GB`, `90%%`, `auto` or `min`; on several devices "
        "that of each, or `cuda:0=20GiB,cuda:1=22GiB`; without any of these options Memfit saves everything and only "
        "measures",
    )
    group.add_argument("--policy", choices=POLICIES, help="one policy for every block, without a budget")
    group.add_argument(
        "--every-n-layers", type=int, metavar="N", help="recompute every N-th block whole, without a budget"
    )
    return group


def add_chunked_loss(parser: argparse.ArgumentParser, *, auto: bool) -> None:
    """Add `--chunked-loss`; ``auto``: whether it may be left to the solver."""
    parser.add_argument(
        "--chunked-loss",
        nargs="?",
        const="on",
        choices=[word for word in CHUNKED_LOSS if auto or word != "auto"],
        help="compute the loss of a language model in chunks of tokens, without its logits; off unless it is given"
        + (", `auto`: if that saves recomputation" if auto else ""),
    )


def read_budget(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those options, and `--chunked-loss`, as arguments of `fit` and `plan`, checked before torch is imported.

    Raises:
        BudgetError: The budget cannot be read.
        UsageError: `--every-n-layers` is below 1.
    """
    parse_budgets(arguments.budget)
    chosen: dict[str, Any] = {}
    if arguments.budget is not None:
        chosen["budget"] = arguments.budget
    if arguments.policy is not None:
        chosen["policy"] = arguments.policy
    if arguments.every_n_layers is not None:
        if arguments.every_n_layers < 1:
            raise UsageError(f"`--every-n-layers {arguments.every_n_layers}` is below 1, which means every block.")
        chosen["every_n_layers"] = arguments.every_n_layers
    if arguments.chunked_loss is not None:
        chosen["chunked_loss"] = CHUNKED_LOSS[arguments.chunked_loss]
    return chosen


def rank() -> int:
    """Which of the processes that `torchrun` or Lightning has started this is; 0 where there is only one."""
    try:
        return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0"))
    except ValueError:
        return 0
