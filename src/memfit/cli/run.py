"""Run an unmodified training script within a memory budget.

The script runs in this process: its exit status, signals, stdout and `sys.argv` are its own. The report goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit import host
from memfit.cli.options import add_budget, add_chunked_loss, rank, read_budget
from memfit.errors import UsageError
from memfit.integrations import script
from memfit.integrations.launcher import Launcher
from memfit.plans import Plan
from memfit.report.text import render

EXIT_NOTHING_FITTED = 5

EPILOG = """\
examples:
  memfit run --budget 6GiB -- train.py --epochs 3
  memfit run --budget 90% --report report.json -- -m package.module
  torchrun --nproc-per-node 2 -m memfit run --budget 20GiB -- train.py

exit status: that of the script if it is not zero, or its signal; 2 usage, 3 no plan fits, 5 nothing was fitted.
On Linux without a GPU the script runs under tcmalloc where the system has it: MEMFIT_ALLOCATOR=system leaves it out.
"""

# Set while the process starts again under another allocator: what LD_PRELOAD was before.
_MARK = "_MEMFIT_LD_PRELOAD"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `memfit run`."""
    parser.usage = "memfit run [options] -- (SCRIPT | -m MODULE) [ARGS ...]"
    group = add_budget(parser)
    group.add_argument("--plan", metavar="FILE", help="apply this plan, written by `memfit plan -o FILE`")
    add_chunked_loss(parser, auto=True)
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="also write the report here: JSON if the name ends in .json, else text; ranks other than 0 insert .rankN",
    )
    parser.add_argument("command", nargs="*", metavar="SCRIPT", help="the script and its arguments, after `--`")


def execute(arguments: argparse.Namespace) -> int:
    """Run the script, then report.

    Returns:
        0, or `EXIT_NOTHING_FITTED`. A script that fails does so by its own exception.
    """
    options = read_budget(arguments)
    if arguments.plan is not None:
        options["plan"] = Plan.load(arguments.plan)
    report = None if arguments.report is None else _report_path(Path(arguments.report))
    script.check(arguments.command)
    _start_under_tcmalloc()
    launcher = Launcher(_fit, options, _words(arguments))
    launcher.install()
    failed = True
    try:
        script.run(arguments.command)
        failed = False
    except SystemExit as stop:
        # None, 0 and False all mean success.
        if stop.code:
            raise
        failed = False
    except BaseException as error:
        for catch in launcher.catches:
            catch.handle.failed(error)
        raise
    finally:
        launcher.remove()
        try:
            _report(launcher, report, failed=failed)
        except Exception as error:
            if not failed:
                raise
            # The script's own failure is on its way: ours must not take its place.
            print(f"memfit: no report: {error}", file=sys.stderr)
    return 0 if launcher.catches or launcher.handed_over else EXIT_NOTHING_FITTED


def _words(arguments: argparse.Namespace) -> list[str]:
    """The same verb with the same options, as words for another process. Files are found from any folder."""
    words = ["run"]
    for name in ("budget", "policy", "every_n_layers", "chunked_loss"):
        if getattr(arguments, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    for name in ("plan", "report"):
        if getattr(arguments, name) is not None:
            words += [f"--{name}", str(Path(getattr(arguments, name)).absolute())]
    return words


def _fit(model: Any, **options: Any) -> Any:
    import memfit

    return memfit.fit(model, **options)


def _report_path(path: Path) -> Path:
    """The report's name for this rank, absolute: the script may change the working directory.

    Raises:
        UsageError: Its folder does not exist, which is better known before the training than after.
    """
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder `{path.parent}` for `--report {path}`.")
    if path.is_dir():
        raise UsageError(f"`--report {path}` is a folder: name a file in it.")
    number = rank()
    return (path if number == 0 else path.with_name(f"{path.stem}.rank{number}{path.suffix}")).absolute()


def _report(launcher: Launcher, path: Path | None, *, failed: bool) -> None:
    """Print the report to stderr (rank 0 only) and write it to its file."""
    summaries = [catch.summary() for catch in launcher.catches]
    if summaries:
        text = "\n\n".join(render(summary) for summary in summaries)
    elif (failed and not launcher.refused) or launcher.handed_over:
        return
    else:
        text = _why_nothing({**launcher.idle, **launcher.refused})
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)
    if path is None:
        return
    if path.suffix == ".json":
        # One model is the rule; several are told apart by a list.
        data = summaries[0] if len(summaries) == 1 else {"models": summaries, "refused": launcher.refused}
        text = json.dumps(data, indent=2)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        print(f"memfit: cannot write the report to `{path}`: {error.strerror}.", file=sys.stderr)


def _why_nothing(reasons: Mapping[str, str]) -> str:
    """Why no hook caught a model: what was seen, or that nothing was."""
    if not reasons:
        return "memfit: nothing was fitted: no model was trained."
    return "\n".join(["memfit: nothing was fitted:", *(f"  {name}: {reason}" for name, reason in reasons.items())])


def _start_under_tcmalloc() -> None:
    """Replace this process by itself under tcmalloc, once, where that changes anything."""
    before = os.environ.pop(_MARK, None)
    if before is not None:
        # Only this process: what the script starts gets what the user had.
        if before:
            os.environ["LD_PRELOAD"] = before
        else:
            os.environ.pop("LD_PRELOAD", None)
        return
    library = host.preload_candidate()
    if library is None:
        return
    before = os.environ.get("LD_PRELOAD", "")
    environment = dict(os.environ)
    environment["LD_PRELOAD"] = f"{library}:{before}" if before else library
    environment[_MARK] = before
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
