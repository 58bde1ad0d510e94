"""DeepSpeed: ZeRO 1, 2 and 3 compute what they do without Memfit, to the last bit; its switches are taken over.

The real DeepSpeed on CPU, gloo, in processes of their own. A run without Memfit in the same processes is the truth;
ranks draw other dropout masks and see other batches. `GONE` is ZeRO-3 as for a model whose weights do not fit: nothing
stays gathered between a module's forward and its backward.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import memfit
from memfit.decider import Decider
from memfit.errors import InfeasibleBudgetError
from memfit.solver.special import full_policy
from ranks import Outcome, equal, in_turn, run, values, whole
from runs import report, tail
from training import batch_of_text, llama

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "MEMFIT_ALLOCATOR": "system"}
GONE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
SMALLEST = {"policy": full_policy}
"""Every block drops what its recipes can bring back."""
FULL = {"policy": "full"}
Step = dict[str, Any]


def start() -> Any:
    """DeepSpeed, with gloo for all collectives: else it compiles an op of its own when it starts."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", dist_init_required=False)
    return deepspeed


def config(stage: int, accumulate: int = 1, zero: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The JSON."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        **more,
    }


def batch(number: int, length: int) -> torch.Tensor:
    """Other texts on every rank."""
    return batch_of_text(2 * number + 5 * dist.get_rank(), length)


def learn(engine: Any, model: nn.Module, loss: torch.Tensor, steps: list[Step]) -> None:
    """One backward and step, noted with the gradients of all ranks together."""
    from deepspeed.utils import safe_get_full_grad

    engine.backward(loss)
    found: Step = {"loss": loss.detach().clone()}
    if engine.is_gradient_accumulation_boundary():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found[f"gradient {name}"] = whole(safe_get_full_grad(parameter))
    engine.step()
    steps.append(found)


def weights(model: nn.Module) -> Step:
    """Of all ranks together."""
    import deepspeed

    everything = [p for p in model.parameters() if hasattr(p, "ds_id")]
    gathering = deepspeed.zero.GatheredParameters(everything) if everything else contextlib.nullcontext()
    with gathering:
        return {f"weight {name}": whole(parameter) for name, parameter in model.named_parameters()}


class Gathers:
    """What ZeRO-3 gathers, and how much of it is still there."""

    def __init__(self) -> None:
        self.count = 0
        self._buffers: list[tuple[StorageWeakRef, int]] = []

    @contextlib.contextmanager
    def watched(self) -> Any:
        """Count."""
        from deepspeed.runtime.zero import partition_parameters as module

        original = module._dist_allgather_fn

        def gather(source: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            storage = target.untyped_storage()
            self._buffers.append((StorageWeakRef(storage), storage.nbytes()))
            return original(source, target, *args, **kwargs)

        module._dist_allgather_fn = gather
        try:
            yield
        finally:
            module._dist_allgather_fn = original

    def alive(self) -> int:
        """Bytes."""
        return sum(size for storage, size in self._buffers if not storage.expired())


def allocated(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """What a forward returns, and the bytes that it has allocated and not freed."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = function()
    results = profile.profiler.kineto_results
    return result, sum(event.nbytes() for event in results.events() if event.name() == "[memory]")


def train(
    stage: int,
    fit: str = "",
    *,
    fitting: Mapping[str, Any] = FULL,
    steps: int = 4,
    length: int = 24,
    freeze: bool = False,
    options: Mapping[str, Any] | None = None,
    accumulate: int = 1,
    **settings: Any,
) -> dict[str, Any]:
    """Train a Llama by an engine.

    Args:
        stage: Of ZeRO.
        fit: ``before`` or ``after`` `deepspeed.initialize`, or ``engine``: that is what is fitted; or not at all.
        fitting: Arguments of `memfit.fit`.
        steps: Batches.
        length: Of their texts.
        freeze: Whether one layer and the embeddings do not train, and of another layer the bias-free norms alone do.
        options: Of the model.
        accumulate: Batches of an optimizer step.
        settings: Of the JSON.
    """
    deepspeed = start()
    model = llama(num_layers=3, **(options or {}))
    if freeze:
        for parameter in [*model.model.layers[0].parameters(), *model.model.layers[1].mlp.parameters()]:
            parameter.requires_grad_(False)
        model.model.embed_tokens.requires_grad_(False)
    handle = memfit.fit(model, **fitting) if fit == "before" else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, config=config(stage, accumulate, **settings), dist_init_required=False
    )
    if fit in ("after", "engine"):
        handle = memfit.fit(model if fit == "after" else engine, **fitting)
    model.train()
    found: list[Step] = []
    gathers, kept, alive, left = Gathers(), [], [], []
    with gathers.watched():
        for number in range(steps):
            torch.manual_seed(100 * number + dist.get_rank())
            ids = batch(number, length)
            loss, size = allocated(lambda ids=ids: engine(input_ids=ids, labels=ids).loss)
            kept.append(size)
            alive.append(gathers.alive())
            learn(engine, model, loss, found)
            del loss
            left.append(_tensors() - sum(len(step) for step in found))
        found.append(weights(model))
    summary = handle.summary() if handle is not None else None
    if handle is not None:
        handle.remove()
    engine.destroy()
    # A thread of gloo may hold a tensor beyond one counting for a moment; a leak shows in each.
    growth = min(after - before for before, after in itertools.pairwise(left[-3:]))
    counts = {"kept": kept[-1], "alive": alive[-1], "left": growth, "gathers": gathers.count}
    return {"steps": found, "summary": summary, **counts}


def _tensors() -> int:
    """How many there are."""
    gc.collect()
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


BF16 = {"bf16": {"enabled": True}}
VARIANTS: dict[str, tuple[int, dict[str, Any], list[tuple[str, Mapping[str, Any], str]]]] = {
    # Stage, options, and how it is fitted: when, with what, and how blocks are to run.
    "zero 1": (1, {}, [("before", FULL, "replay"), ("after", {"budget": "min"}, "replay")]),
    "zero 2": (2, {}, [("before", {"budget": "min"}, "replay"), ("engine", FULL, "replay")]),
    "zero 2 accumulates": (2, {"accumulate": 2}, [("before", FULL, "replay")]),
    "zero 3": (3, {}, [("before", SMALLEST, "replay"), ("after", FULL, "fallback")]),
    "zero 3 gone": (
        3,
        {"zero": GONE},
        [("before", SMALLEST, "replay"), ("after", SMALLEST, "replay"), ("engine", FULL, "fallback")],
    ),
    "zero 3 frozen": (
        3,
        {"zero": GONE, "freeze": True},
        [("after", SMALLEST, "replay"), ("before", {"budget": "min"}, "fallback")],
    ),
    "zero 3 bf16 accumulates": (
        3,
        {"zero": GONE, "accumulate": 2, **BF16},
        [("before", SMALLEST, "replay"), ("before", FULL, "fallback")],
    ),
}


def compare(name: str) -> list[dict[str, Any]]:
    stage, options, ways = VARIANTS[name]
    plain = train(stage, **options)
    found = []
    for fit, fitting, mode in ways:
        fitted = train(stage, fit, fitting=fitting, **options)
        found.append({"fit": fit, "mode": mode, "difference": equal(fitted.pop("steps"), plain["steps"]), **fitted})
        found[-1]["plain"] = {key: plain[key] for key in ("kept", "alive", "left", "gathers")}
    return found


def play(names: list[str]) -> dict[str, Outcome]:
    return in_turn(SCENARIOS, names)


def played(names: list[str], ranks: int) -> Callable[[str], list[Any]]:
    outcomes = run(play, names, ranks=ranks, deadline=280, environment=ENVIRONMENT)
    return lambda name: values([o if o.value is None else o.value[name] for o in outcomes])


@pytest.fixture(scope="module")
def zero_on_two() -> Callable[[str], list[Any]]:
    """What the variants of ZeRO came to on each of two ranks."""
    return played(list(VARIANTS), 2)


@pytest.fixture(scope="module")
def zero_on_one() -> Callable[[str], list[Any]]:
    """On one."""
    return played(["zero 1", "zero 3 frozen"], 1)


@pytest.fixture(scope="module")
def others_on_two() -> Callable[[str], list[Any]]:
    """What the other scenarios came to on each of two ranks."""
    return played([name for name in OTHERS if name != "pipeline"], 2)


def assert_same(found: dict[str, Any]) -> None:
    """Losses, gradients and weights to the last bit; less is kept; every block runs as it should."""
    assert found["difference"] == "", found
    summary = found["summary"]
    assert {block["mode"] for block in summary["blocks"]} == {found["mode"]}, summary
    assert len(summary["blocks"]) == 3
    if found["mode"] == "replay":
        assert summary["recomputed_bytes"] > 0
    assert found["kept"] < found["plain"]["kept"], found
    assert found["left"] <= max(0, found["plain"]["left"]), "every step leaves tensors behind"
    assert summary["steps"] > 0
    assert summary["predicted_peak_bytes"] is not None


@pytest.mark.parametrize("name", ["zero 1", "zero 3 frozen"])
def test_one_process(name, zero_on_one):
    for found in zero_on_one(name):
        for way in found:
            assert_same(way)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_two_processes(name, zero_on_two):
    for found in zero_on_two(name):
        for way in found:
            assert_same(way)
            assert any("2 ranks" in note for note in way["summary"]["notes"]), way["summary"]


def test_recipes_gather_nothing_and_keep_no_weights(zero_on_two):
    """Replay calls no collective of its own; a block that runs again gathers as a checkpointed one does."""
    for found in zero_on_two("zero 3 gone"):
        for way in found:
            plain = way["plain"]
            assert plain["gathers"] > 0, "nothing was gathered: this counts nothing"
            if way["mode"] == "replay":
                assert way["gathers"] == plain["gathers"], way
            else:
                assert way["gathers"] > plain["gathers"], way
            assert way["alive"] <= plain["alive"], way


class Reading(nn.Module):
    """It reads data in Python, holds its matrix itself, and so cannot be split."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(nn.functional.linear(x, self.weight))
        return x + nn.functional.dropout(h * float(h.detach().max() < 9), 0.1) @ self.weight


class Readers(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(Reading() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def read_by_python() -> list[dict[str, Any]]:
    found = []
    plain: list[Step] = []
    for fitting in (None, SMALLEST, FULL):
        deepspeed = start()
        model = Readers()
        handle = memfit.fit(model, **fitting) if fitting else None
        settings = config(3, zero=GONE)
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=settings, dist_init_required=False
        )
        steps: list[Step] = []
        for number in range(3):
            torch.manual_seed(100 * number + dist.get_rank())
            learn(engine, model, engine(torch.randn(2, 5, 32)), steps)
        plain = plain or steps
        if handle is not None:
            found.append({"difference": equal(steps, plain), "summary": handle.summary()})
            handle.remove()
        engine.destroy()
    return found


def test_blocks_that_python_reads(others_on_two):
    """What one rank may do alone is to keep; to run again, and to gather for it, is for all."""
    for found in others_on_two("reading"):
        for way, mode in zip(found, ("plain", "fallback"), strict=True):
            assert way["difference"] == ""
            assert {block["mode"] for block in way["summary"]["blocks"]} == {mode}, way["summary"]
        assert {block["reason"] for block in found[0]["summary"]["blocks"]} == {"depends on data: item()"}


def broken(what: str) -> dict[str, Any]:
    """Rule 8, switched off in one of its parts."""
    from memfit import fallback, parking

    plain = train(3, zero=GONE, steps=2)
    if what == "aliases":
        parking.by_reference = lambda pack, parameters: pack  # type: ignore[assignment]
        return {"plain": plain, "fitted": train(3, "before", fitting=SMALLEST, zero=GONE, steps=2)}
    fallback.staying = lambda parameters: contextlib.nullcontext()  # type: ignore[assignment]
    return {"plain": plain, "fitted": train(3, "before", fitting=FULL, zero=GONE, steps=2)}


def test_rule_08_aliases_of_partitioned_parameters_keep_them_alive():
    for found in values(run(broken, "aliases", environment=ENVIRONMENT)):
        assert found["fitted"]["alive"] > found["plain"]["alive"], "without the rule nothing is kept"


def test_rule_08_what_the_backward_has_gathered_stays():
    for outcome in run(broken, "freed", environment=ENVIRONMENT):
        assert "size mismatch" in outcome.error, "without the rule nothing is missing"


# A budget that no plan without gathering holds ----------------------------------------------------------------------


def too_small() -> dict[str, Any]:
    """The first plan is refused, as where the budget is too small: all that a process's noisy memory can decide."""
    plan, refused = Decider.plan, []

    def refuse_once(decider: Decider, profile: Any, budget: Any) -> Any:
        if not refused:
            refused.append(budget)
            raise InfeasibleBudgetError(budget, budget + 1, "forward of model.layers.0")
        return plan(decider, profile, budget)

    plain = train(3, zero=GONE)
    Decider.plan = refuse_once  # type: ignore[method-assign]
    try:
        fitted = train(3, "before", fitting={"budget": "2GiB"}, zero=GONE)
    finally:
        Decider.plan = plan  # type: ignore[method-assign]
    return {"difference": equal(fitted["steps"], plain["steps"]), "summary": fitted["summary"]}


def test_whole_blocks_where_recipes_do_not_do(others_on_two):
    for found in others_on_two("too small"):
        assert found["difference"] == ""
        assert {block["mode"] for block in found["summary"]["blocks"]} == {"fallback"}, found["summary"]
        assert any("blocks run again as a whole" in note for note in found["summary"]["notes"])


# DeepSpeed's own checkpointing --------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A model that calls DeepSpeed's checkpoint itself, by the function's name."""

    def __init__(self, function: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.function = function
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import deepspeed

        for layer in self.layers:
            x = x + getattr(deepspeed.checkpointing, self.function)(layer, x)
        return x.square().mean()


BLOCK = {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": 3}}


def checkpointed(fit: bool, function: str = "checkpoint") -> dict[str, Any]:
    deepspeed = start()
    model = Checkpointed(function)
    handle = memfit.fit(model, **FULL) if fit else None
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config(2, **BLOCK), dist_init_required=False
    )
    steps: list[Step] = []
    for number in range(3):
        torch.manual_seed(100 * number + dist.get_rank())
        learn(engine, model, engine(torch.randn(2, 32, requires_grad=True)), steps)
    steps.append(weights(model))
    summary = handle.summary() if handle is not None else None
    engine.destroy()
    from deepspeed.runtime.activation_checkpointing import checkpointing

    return {"steps": steps, "summary": summary, "function": checkpointing.CheckpointFunction.__name__}


def compare_checkpointed() -> dict[str, Any]:
    plain, fitted = checkpointed(False), checkpointed(True)
    idle = train(1, "before", steps=2, **BLOCK)["summary"]
    other = checkpointed(True, "non_reentrant_checkpoint")
    return {
        "difference": equal(fitted["steps"], plain["steps"]),
        "idle": idle["notes"],
        "other": other["summary"],
        "other_difference": equal(other["steps"], checkpointed(False, "non_reentrant_checkpoint")["steps"]),
        **fitted,
    }


def test_its_own_checkpoint_is_taken_over(others_on_two):
    for found in others_on_two("checkpoint"):
        assert found["difference"] == ""
        assert {block["mode"] for block in found["summary"]["blocks"]} == {"replay"}, found["summary"]
        assert found["summary"]["recomputed_bytes"] > 0
        assert any("`deepspeed.checkpointing.checkpoint` was taken over" in n for n in found["summary"]["notes"])
        assert not any("does nothing here" in note for note in found["summary"]["notes"])
        assert found["function"] == "CheckpointFunction", "it was not put back"


def test_a_block_of_json_that_does_nothing_is_reported(others_on_two):
    for found in others_on_two("checkpoint"):
        assert (
            sum("`activation_checkpointing` in DeepSpeed's configuration does nothing" in n for n in found["idle"]) == 1
        )
        assert not any("was taken over" in note for note in found["idle"])


def test_its_other_checkpoint_is_left_alone(others_on_two):
    """Around a block it hides what autograd keeps: the block runs as it is, and the report says why."""
    for found in others_on_two("checkpoint"):
        assert found["other_difference"] == ""
        assert found["other"]["blocks"] == []
        assert any("`deepspeed.checkpointing.non_reentrant_checkpoint`" in n for n in found["other"]["notes"])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(32, 64), nn.Linear(64, 32), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(nn.functional.gelu(self.up(x))))


def pipelined(fit: bool, **more: Any) -> dict[str, Any]:
    deepspeed = start()
    torch.manual_seed(5)
    interval = 2
    model = deepspeed.pipe.PipelineModule(
        layers=[deepspeed.pipe.LayerSpec(Layer) for _ in range(4)],
        num_stages=1,
        loss_fn=nn.functional.mse_loss,
        activation_checkpoint_interval=interval,
        seed_layers=True,
        seed_fn=torch.manual_seed,
    )
    handle = memfit.fit(model, **FULL) if fit else None
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config(1, 2, **more), dist_init_required=False
    )
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(2, 32, generator=generator), torch.randn(2, 32, generator=generator)) for _ in range(12)]
    iterator = iter(data)
    steps: list[Step] = [{"loss": whole(engine.train_batch(iterator))} for _ in range(4)]
    steps.append(weights(model))
    summary = handle.summary() if handle is not None else None
    function = model.activation_checkpoint_func.__name__
    return {"steps": steps, "summary": summary, "function": function}


def compare_pipelined() -> list[dict[str, Any]]:
    found = []
    for more in ({}, {"pipeline": {"use_reentrant": False}}):
        plain, fitted = pipelined(False, **more), pipelined(True, **more)
        same = fitted["function"] == plain["function"]
        found.append({"difference": equal(fitted["steps"], plain["steps"]), "restored": same, **fitted})
    return found


def test_a_pipeline_is_taken_over():
    """Its segments are seeded as they were, by both of its functions."""
    for found in values(
        [
            o if o.value is None else o.value["pipeline"]
            for o in run(play, ["pipeline"], ranks=1, environment=ENVIRONMENT)
        ]
    )[0]:
        assert found["difference"] == ""
        assert found["restored"]
        summary = found["summary"]
        assert {block["mode"] for block in summary["blocks"]} == {"replay"}, summary
        assert len(summary["blocks"]) == 4
        assert summary["recomputed_bytes"] > 0
        assert any("`activation_checkpoint_interval=2` was taken over" in note for note in summary["notes"])


# DeepSpeed-Chat ------------------------------------------------------------------------------------------------------


class RewardModel(nn.Module):
    """As DeepSpeed-Chat's: a transformer and a head, the switch forwarded without arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.rwtransformer = llama(seed=1, num_layers=2).model
        self.v_head = nn.Linear(32, 1, bias=False)

    def gradient_checkpointing_enable(self) -> None:
        self.rwtransformer.gradient_checkpointing_enable()

    def gradient_checkpointing_disable(self) -> None:
        self.rwtransformer.gradient_checkpointing_disable()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.v_head(self.rwtransformer(input_ids=ids)[0]).squeeze(-1)


def _log_probabilities(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


AMPLE = 32 * 2**30
"""A budget of bytes in which a critic can keep everything, while its actor keeps as little as can be."""


def chat(stage: int, fit: bool) -> dict[str, Any]:
    """DeepSpeed-Chat's third step: generate, score, update the actor, update the critic."""
    deepspeed = start()
    actor, critic = llama(num_layers=2), RewardModel()
    handles = []
    engines = []
    for model, fitting in ((actor, {"budget": "min"}), (critic, {"budget": AMPLE} if stage == 2 else SMALLEST)):
        handles += [memfit.fit(model, **fitting)] if fit else []
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=config(stage), dist_init_required=False
        )
        engines.append(engine)
    critic.gradient_checkpointing_enable()
    steps: list[Step] = []
    for number in range(4):
        torch.manual_seed(100 * number + dist.get_rank())
        for engine in engines:
            engine.eval()
        with torch.no_grad():
            prompt = batch(number, 12)
            ids = engines[0].module.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                synced_gpus=stage == 3,
            )
            old = _log_probabilities(engines[0](input_ids=ids).logits, ids)
            reward = engines[1](ids)
        for engine in engines:
            engine.train()
        engines[0].module.gradient_checkpointing_enable()
        ratio = torch.exp(_log_probabilities(engines[0](input_ids=ids, use_cache=False).logits, ids) - old)
        learn(engines[0], actor, -(ratio * reward[:, 1:]).mean(), steps)
        learn(engines[1], critic, (engines[1](ids) - reward - 0.1).square().mean(), steps)
        engines[0].module.gradient_checkpointing_disable()
        steps[-1]["tokens"] = ids
    steps += [weights(actor), weights(critic)]
    summaries = [handle.summary() for handle in handles]
    for handle in handles:
        handle.remove()
    for engine in engines:
        engine.destroy()
    return {"steps": steps, "summaries": summaries}


def compare_chat(stage: int) -> dict[str, Any]:
    plain, fitted = chat(stage, False), chat(stage, True)
    return {"difference": equal(fitted["steps"], plain["steps"]), "summaries": fitted["summaries"]}


@pytest.mark.parametrize(("stage", "actor"), [(2, "replay"), (3, "fallback")])
def test_an_actor_and_a_critic(stage, actor, others_on_two):
    """The switch is thrown around every update; generation in between; each model has a budget of its own."""
    for found in others_on_two(f"chat {stage}"):
        assert found["difference"] == ""
        for summary, mode in zip(found["summaries"], (actor, "replay"), strict=True):
            assert {block["mode"] for block in summary["blocks"]} == {mode}, summary
            assert len(summary["blocks"]) == 2
            assert summary["steps"] == 4
            assert any("own gradient checkpointing was taken over" in note for note in summary["notes"])
        own, other = found["summaries"]
        assert own["budget"] == "min"
        assert (own["recomputed_bytes"] > 0) is (stage == 2), "nobody counts in blocks that run again as a whole"
        assert other["budget_bytes"] == (AMPLE if stage == 2 else None)
        assert (other["recomputed_bytes"] > 0) is (stage == 3)


# Unmodified scripts, the Trainer, the example -----------------------------------------------------------------------

SCRIPT = """
import json, sys
import deepspeed, torch
import torch.distributed as dist
from training import batch_of_text, llama

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
model = llama(num_layers=3)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=json.loads(sys.argv[1]))
engine.module.gradient_checkpointing_enable()
losses = []
for number in range(4):
    torch.manual_seed(100 * number + dist.get_rank())
    ids = batch_of_text(number + dist.get_rank())
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    losses.append(float(loss).hex())
if dist.get_rank() == 0:
    print("losses", *losses)
dist.destroy_process_group()
"""


def script_environment() -> dict[str, str]:
    here = os.path.dirname(os.path.abspath(__file__))
    return {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))}


def losses_of(done: Any) -> str:
    assert done.status == 0, tail(done.output)
    return next(line for line in done.output.splitlines() if line.startswith("losses"))


@pytest.mark.parametrize(
    ("stage", "budget", "mode"), [(2, "min", "replay"), (3, "2GiB", "replay"), (3, "min", "fallback")]
)
def test_an_unmodified_script(runs, stage, budget, mode):
    """Under `torchrun`: the model is found in the engine, and its switch is taken over."""
    (runs.folder / "train.py").write_text(SCRIPT)
    settings = json.dumps(config(stage, zero=GONE if stage == 3 else {}))
    plain = losses_of(runs.torchrun(2, "train.py", settings, **script_environment()))
    memfit_run = ["-m", "memfit", "run", "--budget", budget, "--report", "report.json", "--"]
    assert losses_of(runs.torchrun(2, *memfit_run, "train.py", settings, **script_environment())) == plain
    for name in ("report.json", "report.rank1.json"):
        summary = report(runs.folder / name)
        assert summary["model"] == "LlamaForCausalLM"
        assert {block["mode"] for block in summary["blocks"]} == {mode}, summary
        assert [block["name"] for block in summary["blocks"]] == [f"model.layers.{i}" for i in range(3)]
        assert summary["steps"] == 4
        assert any("told to checkpoint its activations: taken over" in note for note in summary["notes"])


CHAT = """
import torch.distributed as dist
from test_deepspeed import chat

dist.init_process_group("gloo")
found = chat(2, False)
if dist.get_rank() == 0:
    print("losses", *(float(step["loss"]).hex() for step in found["steps"] if "loss" in step))
"""


def test_an_unmodified_actor_and_critic(runs):
    """DeepSpeed-Chat's third step under `memfit run`: both models are caught, by the switches that are thrown."""
    (runs.folder / "chat.py").write_text(CHAT)
    plain = losses_of(runs.torchrun(2, "chat.py", **script_environment()))
    memfit_run = ["-m", "memfit", "run", "--budget", "min", "--report", "report.json", "--", "chat.py"]
    assert losses_of(runs.torchrun(2, *memfit_run, **script_environment())) == plain
    for name in ("report.json", "report.rank1.json"):
        models = report(runs.folder / name)["models"]
        assert [summary["model"] for summary in models] == ["LlamaForCausalLM", "RewardModel"]
        for summary in models:
            assert {block["mode"] for block in summary["blocks"]} == {"replay"}, summary
            assert summary["recomputed_bytes"] > 0
            assert summary["steps"] == 4
            assert any("told to checkpoint its activations: taken over" in note for note in summary["notes"])


def test_its_own_launcher(runs):
    """`deepspeed --module memfit run …`: the script's losses, and a report of each rank."""
    (runs.folder / "train.py").write_text(SCRIPT)
    settings = json.dumps(config(2))
    plain = losses_of(runs.torchrun(2, "train.py", settings, **script_environment()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        2,
        "--master_port",
        port,
        "--no_local_rank",
        "--module",
    ]
    memfit_run = ["memfit", "run", "--budget", "min", "--report", "report.json", "--", "train.py", settings]
    done = runs.python(*launcher, *memfit_run, **script_environment())
    assert losses_of(done) == plain
    for name in ("report.json", "report.rank1.json"):
        assert {block["mode"] for block in report(runs.folder / name)["blocks"]} == {"replay"}


TRAINER = """
import json, sys
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from training import llama, rows, weights

import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
callbacks = []
if sys.argv[2] != "plain":
    from memfit.integrations.transformers import MemfitCallback
    from memfit.solver.special import full_policy
    callbacks = [MemfitCallback(**({"policy": full_policy} if sys.argv[2] == "smallest" else {"budget": sys.argv[2]}))]
arguments = TrainingArguments(
    "out", deepspeed=json.loads(sys.argv[1]), use_cpu=True, max_steps=4, per_device_train_batch_size=2, seed=3,
    logging_steps=1, save_strategy="no", report_to=[], activation_checkpointing=True, learning_rate=1e-2,
    max_grad_norm=1.0,
)
model = llama(num_layers=3)
trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=callbacks)
trainer.train()
if trainer.is_world_process_zero():
    history = [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
    print("losses", *history)
    if callbacks:
        print("report", json.dumps(callbacks[0].summary()))
"""


@pytest.mark.parametrize(
    ("ranks", "stage", "budget", "mode"),
    [(1, 2, "min", "replay"), (2, 3, "smallest", "replay"), (2, 3, "min", "fallback")],
)
def test_the_trainer_with_a_json(runs, ranks, stage, budget, mode):
    (runs.folder / "train.py").write_text(TRAINER)
    settings = {**config(stage), "train_micro_batch_size_per_gpu": "auto"}
    environment = script_environment()
    outputs = [
        runs.torchrun(ranks, "train.py", json.dumps(settings), which, **environment) for which in ("plain", budget)
    ]
    assert losses_of(outputs[0]) == losses_of(outputs[1])
    line = next(line for line in outputs[1].output.splitlines() if line.startswith("report"))
    summary = json.loads(line.removeprefix("report"))
    assert {block["mode"] for block in summary["blocks"]} == {mode}, summary
    assert len(summary["blocks"]) == 3
    assert summary["steps"] == 4
    assert any("`activation_checkpointing=True` was taken over" in note for note in summary["notes"])


def test_example(runs):
    """`deepspeed_zero3.py` as it stands, and without Memfit: the same losses."""
    path = os.path.join(os.path.dirname(__file__), "..", "..", "examples", "deepspeed_zero3.py")
    short = ["--steps", "3", "--length", "64"]
    fitted, plain = (runs.torchrun(2, path, *short, *more, **ENVIRONMENT) for more in ([], ["--plain"]))
    for done in (fitted, plain):
        assert done.status == 0, tail(done.output)
    losses = [[line for line in done.output.splitlines() if ": loss " in line] for done in (fitted, plain)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert "  fallback  " in fitted.output


OTHERS: dict[str, Callable[[], Any]] = {
    "checkpoint": compare_checkpointed,
    "pipeline": compare_pipelined,
    "too small": too_small,
    "reading": read_by_python,
    "chat 2": partial(compare_chat, 2),
    "chat 3": partial(compare_chat, 3),
}
SCENARIOS = {name: partial(compare, name) for name in VARIANTS} | OTHERS
