"""Options of the verbs that predict a step of a model without running it: `plan`, `frontier`, `max`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memfit.cli.options import CHUNKED_LOSS, add_chunked_loss
from memfit.errors import UsageError
from memfit.hardware import parse_gpus
from memfit.parallelism import parallelism
from memfit.predictions import PRECISIONS, QUANTIZED, TASKS
from memfit.units import parse_budget

if TYPE_CHECKING:
    from memfit.forecast import Forecast

MODEL_HELP = "a known model (`llama-3-8b`), a folder or `config.json`, or a name on the Hub"


def numbers(text: str) -> tuple[int, ...]:
    """``1,4`` as numbers."""
    return tuple(int(word) for word in text.split(","))


def add_step(parser: argparse.ArgumentParser, *, batch: bool = True, several: bool = False) -> None:
    """What is trained, on what.

    Args:
        parser: Of the verb.
        batch: Whether batch and length have defaults; else they are ``None`` unless given.
        several: Whether they may be several, as ``1,4``: then they are tuples, and the step one that can be measured.
    """
    step = parser.add_argument_group("the step")
    kind, metavar = (numbers, "N,M") if several else (int, "N")
    rows, length = ((1,), (512,)) if several else (1, 512)
    step.add_argument(
        "--batch", type=kind, metavar=metavar, default=rows if batch else None, help="rows of each device's batch"
    )
    step.add_argument("--seq", type=kind, metavar=metavar, default=length if batch else None, help="tokens of a row")
    step.add_argument("--task", choices=TASKS, help="by default what the configuration is for")
    step.add_argument("--dtype", choices=PRECISIONS, default="bf16", help="of the weights; `-mixed`: fp32, autocast")
    step.add_argument("--attention", metavar="NAME", help="transformers' attention: `sdpa` (default) or `eager`")
    step.add_argument("--padded", action="store_true", help="rows have padding, so that attention gets a mask")
    step.add_argument("--lora", type=int, metavar="RANK", help="train LoRA adapters (PEFT) instead of the weights")
    step.add_argument("--lora-targets", metavar="A,B", help="modules with adapters; all linear layers by default")
    step.add_argument("--lora-dropout", type=float, default=0.0, metavar="P", help="dropout of the adapters")
    if not several:
        step.add_argument(
            "--quantize",
            choices=QUANTIZED,
            help="base weights under `--lora`, as bitsandbytes keeps them: NF4, LLM.int8",
        )
    step.add_argument("--freeze", metavar="A,B", help="parts of parameter names that do not train")
    step.add_argument("--optimizer", metavar="NAME", help="`adamw` (default), `adamw_8bit`, `adafactor`, `sgd`")
    step.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches of an optimizer step")
    step.add_argument("--group", type=int, default=8, metavar="N", help="passages for each query: embedder, reranker")
    step.add_argument("--temperature", type=float, default=0.02, metavar="T", help="of an embedder's loss")
    if not several:
        step.add_argument(
            "--sub-batch", type=int, metavar="N", help="of an embedder: cache gradients (GradCache), N rows at a time"
        )
    step.add_argument("--trust-remote-code", action="store_true", help="run the code that a configuration brings")
    add_chunked_loss(parser, auto=False)
    device = parser.add_argument_group("the device")
    device.add_argument("--gpu", "--gpus", metavar="NAME", help="such as `rtx4090`, `a100-40gb`, `8xh100`, `here`")
    if several:  # what is only predicted
        parser.set_defaults(quantize=None, sub_batch=None, ddp=False, fsdp=None, zero=None, tp=None)
    else:
        _add_together(device)
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def _add_together(group: argparse._ArgumentGroup) -> None:
    """How several devices work together: one of these, or tensor parallel groups with one of the first two."""
    group.add_argument("--ddp", action="store_true", help="DistributedDataParallel: whole models, reduced gradients")
    group.add_argument("--fsdp", metavar="HOW", help="FSDP2: `full`, `grad`, or `hybrid:N` within groups of N devices")
    group.add_argument("--zero", type=int, metavar="STAGE", help="DeepSpeed's ZeRO: 1, 2 or 3")
    group.add_argument(
        "--tp",
        type=int,
        metavar="N",
        help="tensor parallel over N devices with one batch, as transformers does it; more are groups of N: copies, or "
        "what `--fsdp` makes of them",
    )


def _together(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("ddp", "fsdp", "zero", "tp")}


def check(arguments: argparse.Namespace) -> None:
    """Refuse what needs no torch to be refused.

    Raises:
        UsageError: A number or a device that cannot be.
        BudgetError: The budget cannot be read.
    """
    for name in ("batch", "seq", "accumulate", "group", "lora", "sub_batch"):
        given = getattr(arguments, name)
        for value in given if isinstance(given, tuple) else () if given is None else (given,):
            if value < 1:
                raise UsageError(f"`--{name.replace('_', '-')} {value}` is below 1.")
    if not arguments.temperature > 0:
        raise UsageError(f"`--temperature {arguments.temperature}` is not above 0.")
    if not 0 <= arguments.lora_dropout < 1:
        raise UsageError(f"`--lora-dropout {arguments.lora_dropout}` is no probability below 1.")
    if arguments.lora is None and (arguments.lora_targets or arguments.lora_dropout):
        raise UsageError("`--lora-targets` and `--lora-dropout` are of adapters: give their rank with `--lora`.")
    if arguments.lora is None and arguments.quantize is not None:
        raise UsageError(f"`--quantize {arguments.quantize}`: such weights do not train. Give adapters with `--lora`.")
    for name in ("freeze", "lora_targets"):
        if getattr(arguments, name) is not None and not _parts(getattr(arguments, name)):
            raise UsageError(f"`--{name.replace('_', '-')}` names nothing.")
    parse_budget(getattr(arguments, "budget", None))
    count = parse_gpus(arguments.gpu)[0] if arguments.gpu is not None else 1
    parallelism(count, **_together(arguments))


def refuse_for_functions(arguments: argparse.Namespace) -> None:
    """What a function builds has these already.

    Raises:
        UsageError: One of them is given.
    """
    for name in ("lora", "quantize", "freeze", "task", "attention", "sub_batch"):
        if getattr(arguments, name) is not None:
            raise UsageError(
                f"`--{name.replace('_', '-')}` is for models by name: build it into what `{arguments.target}` returns."
            )


def _parts(words: str | None) -> list[str]:
    return [part.strip() for part in (words or "").split(",") if part.strip()]


def forecaster(arguments: argparse.Namespace, model: str, *, compares: bool = True) -> Callable[[int, int], Forecast]:
    """From a batch and a length to the forecast of a step; ``compares``: as `Forecast` has it."""
    from memfit import configurations
    from memfit.forecast import Forecast

    config = configurations.load(model, trust_remote_code=arguments.trust_remote_code)
    options = {**step_options(arguments), "cache_rows": arguments.sub_batch, "compares": compares}
    return lambda batch, length: Forecast(
        config, **device_options(arguments), task=arguments.task, batch_size=batch, length=length, **options
    )


def step_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `tasks.build`, but for the task and the size of the batch."""
    return {
        "precision": arguments.dtype,
        "attention": arguments.attention,
        "padded": arguments.padded,
        "lora": arguments.lora,
        "lora_targets": _parts(arguments.lora_targets) or None,
        "lora_dropout": arguments.lora_dropout,
        "freeze": _parts(arguments.freeze),
        "quantize": arguments.quantize,
        "group": arguments.group,
        "temperature": arguments.temperature,
    }


def device_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Forecast` that do not depend on what is trained."""
    count, entry = parse_gpus(arguments.gpu or "cpu")
    return {
        "device": entry,
        "num_devices": count,
        **_together(arguments),
        "optimizer": arguments.optimizer or "adamw",
        "accumulate": arguments.accumulate,
        "chunked_loss": CHUNKED_LOSS.get(arguments.chunked_loss, False),
    }
