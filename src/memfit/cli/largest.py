"""The largest batch that fits, or with `--batch` the longest sequence."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from memfit.cli.forecasting import MODEL_HELP, add_step, check, forecaster
from memfit.cli.options import EXIT_INFEASIBLE
from memfit.errors import UsageError
from memfit.predictions import Prediction

EPILOG = """\
Without `--seq` the longest sequence is looked for, in steps of 64 tokens; without `--batch` the largest batch.

examples:
  memfit max llama-3-8b --seq 4096 --lora 16 --gpu rtx4090
  memfit max llama-3-8b --batch 1 --lora 16 --gpu rtx4090
"""
MAX_BATCH = 65536
MAX_POSITIONS = 2**20
TOKENS = 64
"""A sequence is a multiple of that many."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `memfit max`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--budget", metavar="BYTES", help="limit on the peak; the device's memory by default")
    add_step(parser, batch=False)


def execute(arguments: argparse.Namespace) -> int:
    """Double until it does not fit, then halve the interval."""
    check(arguments)
    if (arguments.batch is None) == (arguments.seq is None):
        raise UsageError("Give `--seq N` for the largest batch, or `--batch N` for the longest sequence.")
    if arguments.budget == "min":
        raise UsageError("Every step fits into its own smallest peak: give `max` a budget in bytes, or a device.")
    forecast = forecaster(arguments, arguments.model, compares=False)
    by_batch = arguments.batch is None

    fitting: dict[int, Prediction] = {}

    def step_of(number: int) -> tuple[int, int]:
        return (number, arguments.seq) if by_batch else (arguments.batch, number * TOKENS)

    def fits(number: int) -> bool:
        batch, length = step_of(number)
        found = forecast(batch, length).within(arguments.budget)
        if found.fits:
            fitting[number] = found
        print(f"memfit: batch {batch}, {length} tokens: {'fits' if found.fits else 'too large'}", file=sys.stderr)
        return found.fits

    limit = MAX_BATCH if by_batch else _positions(arguments) // TOKENS
    best = largest(fits, limit)
    if best == 0:
        smallest = "a batch of 1" if by_batch else f"a sequence of {TOKENS} tokens"
        print(f"memfit: not even {smallest} fits", file=sys.stderr)
        return EXIT_INFEASIBLE
    step, prediction = step_of(best), fitting[best]
    if arguments.json:
        print(json.dumps({"batch": step[0], "seq": step[1], **prediction.to_dict()}, indent=2, allow_nan=False))
        return 0
    from memfit.report.forecast import render_prediction

    print(f"{'largest':<10} batch {step[0]}, {step[1]} tokens")
    print(render_prediction(prediction))
    return 0


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that fits, 0 if 1 does not; beyond one that does not, none does."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, min(2 * high, limit) if high < limit else limit + 1
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _positions(arguments: argparse.Namespace) -> int:
    from memfit import configurations
    from memfit.simulation.tasks import positions_of, task_of

    config = configurations.load(arguments.model, trust_remote_code=arguments.trust_remote_code)
    if (arguments.task or task_of(config)) == "image":
        raise UsageError("An image has no tokens: leave `--batch` out, and the largest batch is looked for.")
    return positions_of(config) or MAX_POSITIONS
