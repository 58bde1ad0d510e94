"""Plan a training step without training: does it fit, what would it save and recompute, what does that cost?"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memfit import stacks
from memfit.cli.forecasting import MODEL_HELP, add_step, check, device_options, forecaster, refuse_for_functions
from memfit.cli.options import EXIT_INFEASIBLE, add_budget, rank, read_budget
from memfit.errors import UsageError

if TYPE_CHECKING:
    from memfit.forecast import Forecast

EPILOG = """\
A model is planned from its code on fake tensors: no weights, no device. The peak is given as low, expected and high;
it fits where the highest does (exit status 0, else 3). `FILE.py:FUNCTION` is planned on this machine, by one real step,
unless `--gpu` says for what to predict it.

`build()` returns (model, batch) or (model, batch, loss). The batch is passed as the training loop would: a mapping as
keywords, a tuple as positions. `loss(output, batch)` gives the scalar; by default `output.loss`.

A plan holds for as many ranks as it was made by: under `torchrun`, `build()` joins the process group and wraps or
shards the model, and rank 0 writes the plan.

examples:
  memfit plan llama-3-8b --batch 4 --seq 2048 --lora 16 --gpu rtx4090
  memfit plan ./my-model --task embedder --batch 32 --seq 512 --gpu a100-40gb --budget 30GiB --json
  memfit plan bge-m3 --batch 32 --seq 512 --gpus 8xa100-40gb --for flagembedding
  memfit plan train.py:build --budget 6GiB -o plan.json
  torchrun --nproc-per-node 2 -m memfit plan train.py:build --budget 6GiB -o plan.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `memfit plan`."""
    parser.add_argument(
        "target", metavar="MODEL | FILE.py:FUNCTION", help=f"{MODEL_HELP}; or a function that builds one and a batch"
    )
    add_budget(parser)
    add_step(parser)
    parser.add_argument("--explain", action="store_true", help="of a model: how many FLOPs a step has, and why")
    parser.add_argument(
        "--for",
        dest="stack",
        metavar="STACK",
        help=f"the best that a training stack has by itself, as lines to paste: {', '.join(stacks.STACKS)}",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the plan for `memfit run --plan FILE`")


def execute(arguments: argparse.Namespace) -> int:
    """Build, plan, print."""
    options = read_budget(arguments)
    check(arguments)
    if arguments.stack is not None:
        stacks.find(arguments.stack)
    if arguments.output is not None and not Path(arguments.output).absolute().parent.is_dir():
        raise UsageError(f"There is no folder for `-o {arguments.output}`.")
    if arguments.target.endswith(".py"):
        raise UsageError(f"`{arguments.target}` does not name a function: write `{arguments.target}:build`.")
    if arguments.gpu is not None or not _is_function(arguments.target):
        _refuse_switches(arguments)
    if not _is_function(arguments.target):
        return _predict(arguments, forecaster(arguments, arguments.target)(arguments.batch, arguments.seq))
    refuse_for_functions(arguments)
    if arguments.stack is not None and arguments.gpu is None:
        raise UsageError("`--for` goes with a prediction: say for what device with `--gpu`.")
    built = _load(arguments.target)()
    if not isinstance(built, tuple) or len(built) not in (2, 3):
        raise UsageError(
            f"`{arguments.target}` returned {type(built).__name__}: return (model, batch) or (model, batch, loss)."
        )
    if arguments.optimizer is not None:
        options["optimizer"] = arguments.optimizer
    if len(built) == 3:
        options["loss"] = built[2]
    if arguments.gpu is not None:
        from memfit.forecast import Forecast

        return _predict(arguments, Forecast(built[0], built[1], loss=options.get("loss"), **device_options(arguments)))
    first = rank() == 0
    if first:
        print("memfit: planning one training step", file=sys.stderr)
    import memfit
    from memfit.report.text import render_plan

    plan: Any = memfit.plan(built[0], built[1], **options)
    if not first:
        return 0  # all ranks have the same plan
    if arguments.output is not None:
        plan.save(arguments.output)
        print(f"memfit: plan written to {arguments.output}", file=sys.stderr)
    print(json.dumps(json.loads(plan.to_json()), indent=2) if arguments.json else render_plan(plan))
    return 0


def _refuse_switches(arguments: argparse.Namespace) -> None:
    if arguments.policy is not None or arguments.every_n_layers is not None:
        raise UsageError(
            "A prediction shows every switch beside the plan: leave `--policy` and `--every-n-layers` out."
        )


def _predict(arguments: argparse.Namespace, forecast: Forecast) -> int:
    stack = None if arguments.stack is None else stacks.find(arguments.stack)
    prediction = forecast.within(arguments.budget, stack)
    if arguments.output is not None:
        prediction.plan.save(arguments.output)
        print(f"memfit: plan written to {arguments.output}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(prediction.to_dict(), indent=2, allow_nan=False))
    else:
        from memfit.report.forecast import render_prediction

        print(render_prediction(prediction, explain=arguments.explain))
    return 0 if prediction.fits else EXIT_INFEASIBLE


def _is_function(target: str) -> bool:
    """Whether a target names a function, not a model: `train.py:build`, `package.module:build`."""
    place, colon, name = target.rpartition(":")
    return bool(colon) and name.isidentifier() and bool(place) and not os.path.exists(target)


def _load(target: str) -> Callable[[], Any]:
    """The function that `FILE.py:FUNCTION` or `package.module:FUNCTION` names.

    Raises:
        UsageError: There is no such file, module or function. What the file itself raises passes through.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier():
        raise UsageError(f"`{target}` does not name a function: write `train.py:build`.")
    module = _load_file(place) if place.endswith(".py") else _load_module(place)
    build = getattr(module, name, None)
    if not callable(build):
        raise UsageError(f"`{place}` has no function `{name}`.")
    return build  # type: ignore[no-any-return]


def _load_file(place: str) -> Any:
    if not os.path.isfile(place):
        raise UsageError(f"There is no file `{place}` in `{os.getcwd()}`.")
    name = Path(place).stem
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise UsageError(f"`{place}` is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.path.dirname(os.path.realpath(place)))
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _load_module(place: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        # A module that the target imports may be missing too: that is the target's error, with its traceback.
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise UsageError(f"There is no module `{place}`. For a file write `{place}.py:build`.") from None
        raise
