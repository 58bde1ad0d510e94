"""The command line: one file a verb, nothing imported that the verb does not need.

`memfit --help` answers without torch, and `memfit run` leaves the first import of torch to the script.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from memfit._version import __version__
from memfit.cli import bench, doctor, frontier, largest, plan, run
from memfit.cli.options import EXIT_INFEASIBLE
from memfit.errors import BudgetError, InfeasibleBudgetError, MemfitError, PlanError, UsageError

__all__ = ["EXIT_ERROR", "EXIT_INFEASIBLE", "EXIT_USAGE", "VERBS", "build_parser", "main"]

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

VERBS = {"run": run, "plan": plan, "frontier": frontier, "max": largest, "bench": bench, "doctor": doctor}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where the rest stands."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"memfit: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs. Each verb adds its own arguments and sets `execute`."""
    parser = _Parser(
        prog="memfit",
        description="Fit a PyTorch training step into a byte budget: save or recompute, for every saved tensor.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"memfit {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        summary, _, _ = (verb.__doc__ or "").partition("\n")
        child = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=verb.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verb.add_arguments(child)
        child.set_defaults(execute=verb.execute, parser=child)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status. What a script of `memfit run` raises, `SystemExit` and `KeyboardInterrupt` included, passes
        through.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # What follows the first `--` belongs to the script, whatever it looks like.
    cut = words.index("--") if "--" in words else len(words)
    arguments, unknown = build_parser().parse_known_args(words[:cut])
    if unknown:
        hint = ": arguments of the script come after it, and `--` before both" if arguments.verb == "run" else ""
        arguments.parser.error(f"`memfit {arguments.verb}` does not know `{' '.join(unknown)}`{hint}")
    if cut < len(words):
        if arguments.verb != "run":
            return _fail(UsageError(f"`memfit {arguments.verb}` takes nothing after `--`."))
        # `memfit run train.py -- x`: the script came first, and `--` is its own.
        arguments.command = [*arguments.command, "--", *words[cut + 1 :]] if arguments.command else words[cut + 1 :]
    try:
        status: int = arguments.execute(arguments)
    except MemfitError as error:
        return _fail(error)
    except KeyboardInterrupt:
        if arguments.verb == "run":
            raise
        print("memfit: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if arguments.verb == "run":
            raise
        # Whoever read our output has gone, such as `head`; Python would complain again when it flushes at exit.
        sys.stdout = None
        return EXIT_ERROR
    return status


def _fail(error: MemfitError) -> int:
    print(f"memfit: {error}", file=sys.stderr)
    if isinstance(error, InfeasibleBudgetError):
        return EXIT_INFEASIBLE
    return EXIT_USAGE if isinstance(error, UsageError | BudgetError | PlanError) else EXIT_ERROR
