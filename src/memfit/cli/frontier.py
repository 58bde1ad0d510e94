"""Memory against time: the fastest step for every peak that is possible."""

from __future__ import annotations

import argparse
import json

from memfit.cli.forecasting import MODEL_HELP, add_step, check, forecaster
from memfit.errors import UsageError

EPILOG = """\
examples:
  memfit frontier bge-m3 --task embedder --batch 8 --seq 512 --gpu a100-40gb
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `memfit frontier`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_step(parser)
    parser.add_argument("--points", type=int, default=9, metavar="N", help="rows of the table")


def execute(arguments: argparse.Namespace) -> int:
    """Rehearse once, solve for each row."""
    check(arguments)
    if not 2 <= arguments.points <= 100:
        raise UsageError(f"`--points {arguments.points}` is not between 2 and 100.")
    predictions = forecaster(arguments, arguments.model, compares=False)(arguments.batch, arguments.seq).frontier(
        arguments.points
    )
    if arguments.json:
        print(json.dumps([each.to_dict() for each in predictions], indent=2, allow_nan=False))
        return 0
    from memfit.report.forecast import render_frontier

    print(render_frontier(predictions))
    return 0
