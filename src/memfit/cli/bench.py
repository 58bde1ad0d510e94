"""Compare predictions with real steps of a model on this machine, with random weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from memfit.cells import PLANS, TRAINS
from memfit.cli.forecasting import MODEL_HELP, add_step, check, device_options, step_options
from memfit.errors import UsageError
from memfit.files import write_whole

EPILOG = """\
Every combination of `--batch`, `--seq`, `--train` and `--plans` is a cell: predicted as `memfit plan` does, and run in
a process of its own. On CPU the resident set is measured, under tcmalloc where the system has it, held to the highest
peak that was predicted as `memfit run --budget` holds it, and also without that (`unheld`); on CUDA reserved memory. A
cell that would not fit into what is free is not tried.

exit status: 0 if no step took more than the highest that was predicted for it, else 1; 2 usage.

examples:
  memfit bench smollm2-135m --layers 4 --batch 1,2 --seq 256 --dtype fp32 -o results.json
  memfit bench llama-3.2-1b --batch 1,4 --seq 1024,2048 --plans plain,full,middle,min --gpu rtx4090
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `memfit bench`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    grid = parser.add_argument_group("the cells")
    grid.add_argument("--layers", type=int, metavar="N", help="cut the model to so many layers")
    grid.add_argument(
        "--train",
        metavar="A,B",
        default=",".join(TRAINS),
        help="`full`, `lora`, `frozen` (its lower half, or --freeze)",
    )
    grid.add_argument(
        "--plans", metavar="A,B", default="plain,full", help=f"of {', '.join(f'`{name}`' for name in PLANS)}"
    )
    add_step(parser, several=True)
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the cells here, as JSON, with their origin")


def execute(arguments: argparse.Namespace) -> int:
    """Predict, run, compare; print a table."""
    check(arguments)
    if arguments.output is not None and not Path(arguments.output).absolute().parent.is_dir():
        raise UsageError(f"There is no folder for `-o {arguments.output}`.")
    from memfit import bench
    from memfit.origins import origin
    from memfit.report.bench import render_cells

    grid = _grid(arguments)
    cells = []
    for cell in bench.run(grid):
        cells.append(cell)
        print(f"memfit: {cell.name}: {_outcome(cell)}", file=sys.stderr)
    found = {
        "origin": origin(" ".join(["memfit", *sys.argv[1:]]), grid.entry.backend),
        "holds": all(cell.holds for cell in cells),
        "cells": [cell.to_dict() for cell in cells],
    }
    if arguments.output is not None:
        write_whole(Path(arguments.output), json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    print(json.dumps(found, indent=2, allow_nan=False) if arguments.json else render_cells(cells))
    if not any(cell.measured is not None for cell in cells):
        print("memfit: no cell could be measured", file=sys.stderr)
        return 1
    return 0 if found["holds"] else 1


def _grid(arguments: argparse.Namespace) -> Any:
    from memfit import bench

    options = step_options(arguments)
    options.pop("lora")
    freeze = options.pop("freeze")
    device = device_options(arguments)
    for name in ("train", "plans"):
        if not _words(getattr(arguments, name)):
            raise UsageError(f"`--{name}` names nothing.")
    return bench.Grid(
        model=arguments.model,
        layers=arguments.layers,
        batches=arguments.batch,
        lengths=arguments.seq,
        trains=_words(arguments.train),
        plans=_words(arguments.plans),
        entry=device["device"] if arguments.gpu is not None else bench.this_machine(),
        lora=arguments.lora or bench.DEFAULT_RANK,
        freeze=freeze,
        options=options,
        task=arguments.task,
        optimizer=device["optimizer"],
        accumulate=device["accumulate"],
        chunked_loss=device["chunked_loss"],
        trust_remote_code=arguments.trust_remote_code,
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _outcome(cell: Any) -> str:
    if cell.measured is None:
        return f"{'failed' if cell.failed else 'not tried'}: {cell.reason}"
    return f"predicted {cell.peak_ratio:.3f} of what was measured"
