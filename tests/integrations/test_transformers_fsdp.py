"""FSDP2 as accelerate applies it, by the Trainer's `fsdp` and by its own plugin: as without Memfit, in less memory.

accelerate shards on accelerators only. On CPU `AcceleratorState.__init__` passes over the plugin without a word, and a
Trainer that was told `fsdp=True` trains by DDP. So its state is told here that there are several GPUs (`on_cpu`): the
one thing that is not as a user has it. It keeps its device, the CPU, and gloo; what wraps, trains and clips is
transformers', accelerate's and torch's own.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("peft")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

import memfit
from memfit.errors import InfeasibleBudgetError, UsageError
from memfit.integrations.transformers import MemfitCallback
from ranks import Outcome, counted_collectives, equal, in_turn, run, values, whole
from runs import report, tail
from training import SHORT_RUN, assert_planned, batch_of_text, history, llama, metered, rows

PROMPT = torch.tensor([rows()[0]["input_ids"][:6]])


def on_cpu(kind: DistributedType = DistributedType.MULTI_GPU) -> None:
    """accelerate begins anew, with a state that shards."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True).distributed_type = kind


class Noting(TrainerCallback):
    """What the model is when its training begins, and what it generates after the third step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.whole = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
        self.sharded: list[bool] = []
        self.num_whole = 0
        self.tokens: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        layers = [module for module in model.modules() if type(module).__name__.endswith("LlamaDecoderLayer")]
        self.sharded = [isinstance(layer, FSDPModule) for layer in layers]
        gc.collect()
        self.num_whole = sum(not storage.expired() for storage in self.whole)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            model.eval()
            self.tokens = model.generate(PROMPT, max_new_tokens=4, do_sample=False).tolist()
            model.train()


def lora() -> Any:
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(llama(), config)


def trained(
    callback: MemfitCallback | None = None,
    build: Callable[[], Any] = llama,
    *,
    folder: str = "",
    resume: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """What a Trainer came to on this rank."""
    on_cpu()
    options = {
        **SHORT_RUN,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "accelerator_config": {"use_configured_state": True},
    }
    model = build()
    noting = Noting(model)
    with tempfile.TemporaryDirectory() as own:
        trainer = Trainer(
            model,
            TrainingArguments(folder or own, **{**options, **changes}),
            train_dataset=rows() * 2,
            eval_dataset=rows()[:4],
            callbacks=[noting, *([callback] if callback is not None else [])],
        )
        del model
        # Gathered parameters are small beside activations here, so that it does not matter whose thread frees them.
        with counted_collectives() as count:
            metered(trainer).train(resume_from_checkpoint=resume)
    assert trainer.accelerator.is_fsdp2
    assert noting.sharded == [True] * 4
    assert noting.num_whole == 0, "weights of the whole model are kept alive"
    return {
        "numbers": {name: history(trainer, name) for name in ("loss", "grad_norm", "eval_loss")},
        "tokens": noting.tokens,
        "weights": [{name: whole(parameter) for name, parameter in trainer.model.named_parameters()}],
        "collectives": dict(count),
        "peak": trainer.live_peak.bytes,
        "summary": callback.summary() if callback is not None else None,
        "logged": len(history(trainer, "memfit/measured_peak_bytes")),
    }


FULL = {"fsdp": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "words": {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}},
    "accumulated, evaluated": {**FULL, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
    "bf16, tied": {**FULL, "bf16": True, "build": partial(llama, tie_word_embeddings=True)},
    "not resharded, switch": {
        **FULL,
        "fsdp_config": {"reshard_after_forward": False},
        "activation_checkpointing": True,
    },
    "lora": {**FULL, "build": lora},
}


def compare(name: str) -> dict[str, Any]:
    options = VARIANTS[name]
    plain = trained(**{key: value for key, value in options.items() if key != "activation_checkpointing"})
    fitted = trained(MemfitCallback(budget="min"), **options)
    return compared(plain, fitted)


def compared(plain: dict[str, Any], fitted: dict[str, Any]) -> dict[str, Any]:
    weights = equal(fitted.pop("weights"), plain.pop("weights"))
    return {"plain": plain, "fitted": fitted, "weights": weights}


def resumed() -> dict[str, Any]:
    """Six steps in one go, and the last three from the files of the third."""
    shared: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    saving = {**FULL, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "folder": shared[0]}
    plain = trained(**saving)
    again = partial(llama, seed=7)
    return compared(plain, trained(MemfitCallback(budget="min"), again, resume=f"{shared[0]}/checkpoint-3", **saving))


def refused(environment: dict[str, str], **changes: Any) -> str:
    """What a Trainer says to FSDP's own checkpointing beside the callback."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        trained(MemfitCallback(budget="min"), **changes)
    except UsageError as error:
        return str(error)
    finally:
        for name in environment.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
    return ""


LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_activation_checkpointing true` sets."""


def too_small() -> int:
    """A budget below the whole weights, which no rank holds: how many steps were trained before it was refused."""
    on_cpu()
    model = llama()
    callback = MemfitCallback(budget=sum(parameter.nbytes for parameter in model.parameters()) * 3 // 4)
    with tempfile.TemporaryDirectory() as folder:
        options = {"use_cpu": True, "report_to": [], "max_steps": 3, "disable_tqdm": True, **FULL}
        arguments = TrainingArguments(folder, accelerator_config={"use_configured_state": True}, **options)
        trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=[callback])
        try:
            trainer.train()
        except InfeasibleBudgetError:
            return int(trainer.state.global_step)
    raise AssertionError("it was not refused")


def passed_over() -> dict[str, Any]:
    """accelerate on CPU as it is: the words are read, and nothing is sharded."""
    on_cpu(DistributedType.MULTI_CPU)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, **FULL)
        trainer = Trainer(llama(), arguments, train_dataset=rows(), callbacks=[])
        trainer.train()
    wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
    return {"plugin": trainer.args.fsdp_plugin_args is not None, "fsdp": trainer.is_fsdp_enabled, "ddp": wrapped}


def by_plugin(fit: str = "", **plugin: Any) -> tuple[list[dict[str, Any]], Any]:
    """accelerate alone: its plugin, `prepare` and `accumulate`."""
    on_cpu()
    accelerator = Accelerator(
        gradient_accumulation_steps=2,
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **plugin),
    )
    model: Any = llama(num_layers=3).train()
    handle = memfit.fit(model, policy="full") if fit == "before" else None
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert accelerator.is_fsdp2
    if fit == "after":
        handle = memfit.fit(model, policy="full")
    torch.manual_seed(dist.get_rank())
    found = []
    for step in range(6):
        ids = batch_of_text(2 * step + dist.get_rank(), 24)
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            found.append({"loss": loss.detach()} | {n: whole(p.grad) for n, p in model.named_parameters()})
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    summary = handle.summary() if handle is not None else None
    if handle is not None:
        handle.remove()
    return found, summary


def compare_plugin(**plugin: Any) -> list[tuple[str, Any]]:
    plain, _ = by_plugin(**plugin)
    found = []
    for fit in ("before", "after"):
        fitted, summary = by_plugin(fit, **plugin)
        found.append((equal(fitted, plain), summary))
    return found


SCENARIOS: dict[str, Callable[[], Any]] = {
    **{name: partial(compare, name) for name in VARIANTS},
    "resumed": resumed,
    "refused, its arguments": partial(refused, {}, **FULL, fsdp_config={"activation_checkpointing": True}),
    "refused, accelerate's": partial(refused, LAUNCHED),
    "too small": too_small,
    "passed over": passed_over,
    "plugin": compare_plugin,
    "plugin, checkpointing": partial(compare_plugin, activation_checkpointing=True),
}


def play(names: list[str]) -> dict[str, Outcome]:
    return in_turn(SCENARIOS, names)


def played(names: list[str]) -> Callable[[str], list[Any]]:
    found = run(play, names, ranks=2, deadline=280)
    return lambda name: values([outcome if outcome.value is None else outcome.value[name] for outcome in found])


@pytest.fixture(scope="module")
def trainings() -> Callable[[str], list[Any]]:
    """What the Trainer came to in each way, on each of two ranks; all run in the same processes."""
    return played(list(VARIANTS))


@pytest.fixture(scope="module")
def outcomes() -> Callable[[str], list[Any]]:
    """What the other scenarios came to."""
    return played([name for name in SCENARIOS if name not in VARIANTS])


def assert_the_same(found: dict[str, Any], *, steps: int = 5) -> None:
    """Numbers, weights, what is generated and gathered; a plan was at work, and less was alive."""
    plain, fitted = found["plain"], found["fitted"]
    assert len(plain["numbers"]["loss"]) == steps
    assert fitted["numbers"] == plain["numbers"]
    assert found["weights"] == ""
    assert plain["collectives"]["all_gather_single"] > 0, "nothing was gathered: this counts nothing"
    assert 0 < fitted["peak"] < plain["peak"], (fitted["peak"], plain["peak"])
    assert_planned(fitted["summary"])
    assert any("2 ranks run one plan" in note for note in fitted["summary"]["notes"])
    assert fitted["logged"] > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_the_trainers_fsdp(name, trainings):
    """Fitted before FSDP wraps: every number is that of the run without it, and nothing is gathered twice."""
    for found in trainings(name):
        assert_the_same(found)
        assert found["fitted"]["collectives"] == found["plain"]["collectives"]
        taken = [note for note in found["fitted"]["summary"]["notes"] if "was taken over" in note]
        assert len(taken) == ("switch" in name), taken
        assert len(found["plain"]["tokens"]) == 1
        assert found["fitted"]["tokens"] == found["plain"]["tokens"]
        assert len(found["plain"]["numbers"]["eval_loss"]) == (3 if "evaluated" in name else 0)


def test_resuming_from_a_checkpoint(outcomes):
    for found in outcomes("resumed"):
        assert_the_same(found, steps=6)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("refused, its arguments", "fsdp_config['activation_checkpointing']"),
        ("refused, accelerate's", "fsdp_activation_checkpointing"),
    ],
)
def test_checkpointing_by_fsdp_is_refused(name, option, outcomes):
    """By the Trainer's argument, and by what `accelerate launch` was told."""
    for error in outcomes(name):
        assert error.startswith(f"`{option}` is on: FSDP would wrap every block in a checkpoint of its own")
        assert error.endswith("Remove it to keep Memfit, or remove Memfit to keep it.")


def test_whole_weights_do_not_count_against_the_budget(outcomes):
    """They are not whole any more when training begins: what a rank really holds is measured in the first step."""
    assert outcomes("too small") == [1, 1]


def test_accelerate_shards_on_accelerators_only(outcomes):
    """Why `on_cpu` is there; if this fails it can go."""
    assert outcomes("passed over") == [{"plugin": True, "fsdp": False, "ddp": True}] * 2


def test_the_plugin_of_accelerate(outcomes):
    for found in outcomes("plugin"):
        assert [difference for difference, _ in found] == ["", ""]
        for _, summary in found:
            assert {block["mode"] for block in summary["blocks"]} == {"replay"}
            assert summary["recomputed_bytes"] > 0


def test_checkpointing_by_the_plugin_alone(outcomes):
    """Nothing can be refused there: it is left to do what it does without Memfit, and the report says so."""
    for found in outcomes("plugin, checkpointing"):
        assert [difference for difference, _ in found] == ["", ""]
        for _, summary in found:
            assert summary["recomputed_bytes"] is None
            assert any("stepped aside: the model checkpoints its blocks itself" in n for n in summary["notes"])


SCRIPT = """
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from training import history, llama, rows
from transformers import Trainer, TrainingArguments

torch.set_num_threads(1)
PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU  # see test_transformers_fsdp.py
arguments = TrainingArguments(
    "out", max_steps=4, per_device_train_batch_size=2, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
    save_strategy="no", seed=3, learning_rate=1e-2, accelerator_config={"use_configured_state": True},
)
trainer = Trainer(llama(), arguments, train_dataset=rows())
trainer.train()
assert trainer.accelerator.is_fsdp2
if trainer.is_world_process_zero():
    print("losses", history(trainer), history(trainer, "grad_norm"))
"""


def launched(runs: Any, *words: Any, checkpointing: bool = False) -> Any:
    """By `accelerate launch`, on two processes."""
    options = ["--use_fsdp", "--fsdp_version", 2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    options += ["--fsdp_activation_checkpointing", str(checkpointing).lower(), "--num_processes", 2]
    options += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return runs.python("-m", "accelerate.commands.launch", *options, *words, PYTHONPATH=here, PYTHONWARNINGS="ignore")


def test_accelerate_launch(runs):
    """`accelerate launch … -m memfit run`, with an unmodified script; FSDP's own checkpointing is refused there too."""
    (runs.folder / "train.py").write_text(SCRIPT)
    memfit_run = ["-m", "memfit", "run", "--budget", "min", "--report", "report.json", "--", "train.py"]
    plain, fitted = launched(runs, "train.py"), launched(runs, *memfit_run)
    losses = []
    for done in (plain, fitted):
        assert done.status == 0, tail(done.output)
        losses += [line for line in done.output.splitlines() if line.startswith("losses")]
    assert len(losses) == 2
    assert losses[0] == losses[1]
    for name in ("report.json", "report.rank1.json"):
        summary = report(runs.folder / name)
        assert_planned(summary)
        assert "was caught by transformers' Trainer" in summary["notes"][0]
    failed = launched(runs, *memfit_run, checkpointing=True)
    assert failed.status != 0
    assert "`fsdp_activation_checkpointing` is on" in failed.output
