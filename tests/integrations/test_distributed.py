"""Several ranks: what plain DDP and FSDP2 compute, to the last bit; nobody hangs; nothing is gathered twice.

Each test starts its ranks as processes of their own, gloo on CPU, and ends them after two minutes. A run without Memfit
in the same processes is the truth. Ranks draw other dropout masks and see other batches.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import memfit
import memfit.errors
from memfit import ranks
from ranks import (
    CLASSES,
    DEADLINE_SECONDS,
    Outcome,
    counted_collectives,
    equal,
    in_turn,
    loss_of,
    make_batch,
    make_model,
    run,
    values,
    whole,
)

STEPS = 5


def play(names: list[str]) -> dict[str, Outcome]:
    return in_turn(SCENARIOS, names)


@pytest.fixture(scope="module")
def equal_runs() -> Callable[[str], list[Outcome]]:
    """What a scenario that compares with a plain run came to, on each of two ranks."""
    outcomes = run(play, list(EQUAL), ranks=2)
    return lambda name: [_outcome_of(outcome, name) for outcome in outcomes]


@pytest.fixture(scope="module")
def two_ranks() -> Callable[[str], list[Outcome]]:
    """What one in which ranks differ came to."""
    outcomes = run(play, list(TWO), ranks=2)
    return lambda name: [_outcome_of(outcome, name) for outcome in outcomes]


@pytest.fixture(scope="module")
def four_ranks() -> Callable[[str], list[Outcome]]:
    """On each of four."""
    outcomes = run(play, list(FOUR), ranks=4)
    return lambda name: [_outcome_of(outcome, name) for outcome in outcomes]


def _outcome_of(outcome: Outcome, name: str) -> Outcome:
    if outcome.value is None:  # killed: what it printed says how far it came
        return outcome
    found: Outcome = outcome.value[name]
    return found


FULL = {"policy": "full"}
"""Everything is dropped, whatever the memory of so small a model measures."""
Wrap = Callable[[nn.Module], nn.Module]


def train(
    wrap: Wrap,
    fit: str = "",
    *,
    fitting: Mapping[str, Any] = FULL,
    steps: int = STEPS,
    accumulate: int = 1,
    lengths: tuple[int, ...] = (12,),
    unsynchronised: Callable[[nn.Module], Any] | None = None,
    look: Callable[[nn.Module], Any] | None = None,
    batches: int | None = None,
    one_by_one: bool = False,
    **options: Any,
) -> tuple[list[dict[str, Any]], Any]:
    """Train, and keep losses, gradients and buffers of each optimizer step.

    Args:
        wrap: Makes what is trained from the model.
        fit: ``before`` or ``after`` wrapping, or not at all.
        fitting: Arguments of `memfit.fit`.
        steps: Optimizer steps.
        accumulate: Batches of each; all but the last within ``unsynchronised``.
        lengths: Of the batches, in turn.
        unsynchronised: A context in which gradients are not reduced.
        look: Called with the wrapped model after each forward; what it returns is kept too.
        batches: Whose batches and dropout masks, if not this rank's.
        one_by_one: Whether the optimizer takes parameters one by one, as it must where only some are DTensors.
        options: Of the model.

    Returns:
        The steps, and the report's data if the model was fitted.
    """
    torch.manual_seed(dist.get_rank())
    model = make_model(**options)
    handle = memfit.fit(model, **fitting) if fit == "before" else None
    wrapped = wrap(model)
    if fit == "after":
        handle = memfit.fit(wrapped, **fitting)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, foreach=not one_by_one)
    who = dist.get_rank() if batches is None else batches
    torch.manual_seed(100 + who)
    found = []
    for step in range(steps):
        kept: dict[str, Any] = {}
        for part in range(accumulate):
            ids = make_batch(step * accumulate + part, lengths[(step * accumulate + part) % len(lengths)], who)
            last = part == accumulate - 1
            with contextlib.nullcontext() if last or unsynchronised is None else unsynchronised(wrapped):
                loss = loss_of(wrapped(ids), ids)
                if look is not None:
                    kept[f"look {part}"] = look(wrapped)
                loss.backward()
            kept[f"loss {part}"] = loss.detach().clone()
        kept.update({f"gradient {n}": whole(p.grad) for n, p in wrapped.named_parameters()})
        kept.update({f"buffer {n}": whole(b) for n, b in wrapped.named_buffers()})
        found.append(kept)
        optimizer.step()
        optimizer.zero_grad()
    summary = None
    if handle is not None:
        summary = handle.summary()
        handle.remove()
    return found, summary


def assert_replayed(summary: dict[str, Any]) -> None:
    """Every block was replayed, something was dropped, and the optimizer that steps was known to be the model's."""
    assert summary["steps"] > 0
    assert {block["mode"] for block in summary["blocks"]} == {"replay"}, summary["blocks"]
    assert all(block["recomputed_bytes"] for block in summary["blocks"]), summary["blocks"]


# DDP ------------------------------------------------------------------------------------------------------------------


def ddp_static(model: nn.Module) -> nn.Module:
    return DDP(model, static_graph=True)


def ddp_unused(model: Any) -> nn.Module:
    model.uses_other = False
    return DDP(model, find_unused_parameters=True)


def ddp_view(model: nn.Module) -> nn.Module:
    return DDP(model, gradient_as_bucket_view=True, bucket_cap_mb=1, broadcast_buffers=True)


def no_sync(model: Any) -> Any:
    return model.no_sync()


DDP_VARIANTS: dict[str, tuple[Wrap, dict[str, Any]]] = {
    "plain": (DDP, {}),
    "static": (ddp_static, {}),
    "unused": (ddp_unused, {}),
    "view": (ddp_view, {}),
    "accumulate": (DDP, {"accumulate": 3, "unsynchronised": no_sync, "steps": 3}),
    "static, two backwards": (ddp_static, {"accumulate": 2, "steps": 3}),
    "budget": (DDP, {"fitting": {"budget": "min"}}),
    "lengths": (DDP, {"lengths": (12, 9, 12, 15), "steps": 8}),
}


def fits(name: str, names: list[str]) -> list[str]:
    """Fitted before and after wrapping: both for the first variant, in turn for the others."""
    return ["before", "after"] if name == names[0] else [("before", "after")[names.index(name) % 2]]


def compare_ddp(names: list[str]) -> list[str]:
    found = []
    for name in names:
        wrap, options = DDP_VARIANTS[name]
        plain, _ = train(wrap, **options)
        for fit in fits(name, names):
            fitted, summary = train(wrap, fit, **options)
            if "fitting" not in options:
                assert_replayed(summary)
            found.append(f"{name}, fitted {fit}: {equal(fitted, plain) or 'equal'}")
    return found


def test_ddp_computes_what_it_computes_alone(equal_runs):
    """Gradients of every step, synchronised or not; a parameter is never marked as ready twice."""
    for found in values(equal_runs("ddp")):
        assert [line for line in found if not line.endswith(": equal")] == []
        assert len(found) == len(DDP_VARIANTS) + 1


def test_ddp_on_four_ranks(four_ranks):
    for found in values(four_ranks("four ddp")):
        assert [line for line in found if not line.endswith(": equal")] == []
        assert len(found) == 3


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from ranks import loss_of, make_batch, make_model

torch.set_num_threads(1)
dist.init_process_group("gloo")
model = DistributedDataParallel(make_model())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(dist.get_rank())
found = []
for step in range(4):
    ids = make_batch(step)
    loss = loss_of(model(ids), ids)
    loss.backward()
    found.append({"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()})
    optimizer.step()
    optimizer.zero_grad()
torch.save(found, f"{sys.argv[1]}{dist.get_rank()}")
dist.destroy_process_group()
"""


def torchrun(*arguments: str, ranks: int = 2, fails: bool = False) -> str:
    """What it printed; it has to end well, or to fail, and in time."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    with subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # the deadline ends the ranks too
    ) as process:
        try:
            text, _ = process.communicate(timeout=DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            pytest.fail(f"it hangs:\n{text}")
    assert (process.returncode != 0) == fails, text
    return text


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memfit_run_under_torchrun(tmp_path, ranks):
    """An unmodified script: `torchrun ... -m memfit run`."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun(str(script), str(tmp_path / "plain"), ranks=ranks)
    options = ["--budget", "min", "--report", str(tmp_path / "report.json")]
    torchrun("-m", "memfit", "run", *options, "--", str(script), str(tmp_path / "fitted"), ranks=ranks)
    for rank in range(ranks):
        report = json.loads((tmp_path / (f"report.rank{rank}.json" if rank else "report.json")).read_text())
        assert [block["mode"] for block in report["blocks"]] == ["replay"] * 3
        assert not equal(torch.load(tmp_path / f"fitted{rank}"), torch.load(tmp_path / f"plain{rank}"))


EXAMPLE = str(Path(__file__).parents[2] / "examples" / "fsdp2_torchrun.py")


SHORT = ["--steps", "3", "--length", "64"]


def losses_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if ": loss " in line]


def test_the_example_runs_as_it_stands():
    fitted = torchrun(EXAMPLE, *SHORT)
    assert len(losses_of(fitted)) == 3
    assert losses_of(fitted) == losses_of(torchrun(EXAMPLE, *SHORT, "--plain"))
    assert "  replay  " in fitted


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memfit_run_with_fsdp2(tmp_path, ranks):
    """The example without its own line is an unmodified script."""
    plain = torchrun(EXAMPLE, *SHORT, "--plain", ranks=ranks)
    options = ["--budget", "min", "--report", str(tmp_path / "report.json")]
    fitted = torchrun("-m", "memfit", "run", *options, "--", EXAMPLE, *SHORT, "--plain", ranks=ranks)
    assert len(losses_of(plain)) == 3
    assert losses_of(fitted) == losses_of(plain)
    for rank in range(ranks):
        report = json.loads((tmp_path / (f"report.rank{rank}.json" if rank else "report.json")).read_text())
        assert {block["mode"] for block in report["blocks"]} == {"replay"}
        assert report["recomputed_bytes"] > 0


PLANNED = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from ranks import loss_of, make_batch, make_model

def build():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return DistributedDataParallel(make_model()), (make_batch(0),), lambda output, batch: loss_of(output, batch[0])

if __name__ == "__main__":
    model, _, loss_of_batch = build()
    torch.manual_seed(dist.get_rank())
    found = []
    for step in range(4):
        batch = (make_batch(step),)
        loss_of_batch(model(*batch), batch).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
    torch.save(found, f"{sys.argv[1]}{dist.get_rank()}")
    dist.destroy_process_group()
"""


def test_a_plan_holds_for_the_ranks_it_was_made_by(tmp_path):
    """Made by one `torchrun`, applied in another; refused with another number of ranks, with the reason."""
    script = tmp_path / "train.py"
    script.write_text(PLANNED)
    for number in (1, 2):
        path = tmp_path / f"plan{number}.json"
        command = ["-m", "memfit", "plan", f"{script}:build", "--policy", "selective", "-o", str(path)]
        text = torchrun(*command, ranks=number)
        assert text.count("plan written to") == 1
        plan = memfit.Plan.load(path)
        assert (plan.world_size, plan.mesh) == (number, ())
        torchrun(str(script), str(tmp_path / "plain"), ranks=number)
        options = ["--plan", str(path), "--report", str(tmp_path / "report.json")]
        torchrun("-m", "memfit", "run", *options, "--", str(script), str(tmp_path / "fitted"), ranks=number)
        for rank in range(number):
            report = json.loads((tmp_path / (f"report.rank{rank}.json" if rank else "report.json")).read_text())
            assert (report["saved_bytes"], report["recomputed_bytes"]) == (plan.saved_bytes, plan.recomputed_bytes)
            assert not [note for note in report["notes"] if "does not know" in note]
            assert not equal(torch.load(tmp_path / f"fitted{rank}"), torch.load(tmp_path / f"plain{rank}"))
    for made, number in ((1, 2), (2, 1)):
        options = ["--plan", str(tmp_path / f"plan{made}.json")]
        text = torchrun("-m", "memfit", "run", *options, "--", str(script), "none", ranks=number, fails=True)
        many = {1: "1 rank", 2: "2 ranks"}
        assert f"The plan is for {many[made]}, the model is trained by {many[number]}: weights" in text


def plans_by_mesh() -> dict[str, Any]:
    """A plan of a sharded model: applied to another such, and to one that every rank has whole."""

    def shard(model: nn.Module) -> nn.Module:
        for block in model.blocks:
            fully_shard(block)
        return fully_shard(model)

    ids = make_batch(0)
    made = memfit.plan(shard(make_model()), (ids,), policy="selective", loss=lambda output, batch: loss_of(output, ids))
    plain, _ = train(shard)
    fitted, summary = train(shard, "after", fitting={"plan": made})
    error, model = "", DDP(make_model())
    memfit.fit(model, plan=made)
    try:
        model(ids)
    except memfit.PlanError as refused:
        error = str(refused)
    memfit.fit(model, policy="full").remove()  # nothing is left of the one that was refused
    return {
        "world": (made.world_size, made.mesh),
        "difference": equal(fitted, plain),
        "bytes": [made.saved_bytes - summary["saved_bytes"], made.recomputed_bytes - summary["recomputed_bytes"]],
        "error": error,
    }


def test_a_plan_holds_for_the_mesh_it_was_made_on(two_ranks):
    for found in values(two_ranks("plans by mesh")):
        assert found["world"] == (2, (2,))
        assert found["difference"] == ""
        assert found["bytes"] == [0, 0]
        assert found["error"].startswith(
            "The plan is for 2 ranks that shard it over a mesh of 2, the model is trained by 2 ranks: weights"
        )


def accelerated() -> list[str]:
    """A Llama under accelerate, which wraps it and accumulates gradients."""
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForCausalLM

    def once(fit: str) -> Any:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        torch.manual_seed(3)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=CLASSES, num_hidden_layers=3, attention_dropout=0.1, **sizes))
        model.train()
        handle = memfit.fit(model, **FULL) if fit == "before" else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(model, DDP)
        if fit == "after":
            handle = memfit.fit(model, **FULL)
        torch.manual_seed(dist.get_rank())
        found = []
        for step in range(6):
            ids = make_batch(step)
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                found.append({"loss": loss.detach()} | {n: whole(p.grad) for n, p in model.named_parameters()})
                optimizer.step()
                optimizer.zero_grad()
        if handle is not None:
            assert_replayed(handle.summary())
            handle.remove()
        return found

    return [equal(once(fit), once("")) for fit in ("before", "after")]


def test_accelerate_computes_what_it_computes_alone(equal_runs):
    """Prepared by accelerate: DDP and `no_sync` are its own."""
    assert values(equal_runs("accelerate")) == [["", ""]] * 2


# FSDP2 ----------------------------------------------------------------------------------------------------------------

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(model: Any, **options: Any) -> Any:
    """`fully_shard` each block, then the root."""
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def shard_half(model: Any) -> Any:
    return shard(model, mp_policy=HALF)


def shard_gathered(model: Any) -> Any:
    return shard(model, reshard_after_forward=False)


def shard_pairs(model: Any) -> Any:
    """Two blocks share a group: they are gathered and freed together."""
    fully_shard([model.blocks[0], model.blocks[1]])
    return fully_shard(model)


def shard_root(model: Any) -> Any:
    """One group for everything, freed after the forward."""
    return fully_shard(model, reshard_after_forward=True)


def shard_hybrid(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return shard(model, mesh=mesh)


@contextlib.contextmanager
def no_gradient_sync(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def gathered_bytes(model: Any) -> int:
    """What gathered parameters take now: nothing where FSDP has freed them, whoever holds the tensors."""
    found = 0
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    found += sum(tensor.untyped_storage().nbytes() for tensor in parameter.all_gather_outputs)
    return found


FSDP_VARIANTS: dict[str, tuple[Wrap, dict[str, Any]]] = {
    "blocks": (shard, {}),
    "bf16": (shard_half, {}),
    "not resharded": (shard_gathered, {}),
    "pairs": (shard_pairs, {}),
    "root": (shard_root, {}),
    "accumulate": (shard, {"accumulate": 3, "unsynchronised": no_gradient_sync, "steps": 3}),
    "budget": (shard, {"fitting": {"budget": "min"}}),
    "lengths": (shard, {"lengths": (12, 9, 12, 15), "steps": 8}),
    "hybrid": (shard_hybrid, {}),
}


def compare_fsdp(names: list[str]) -> list[str]:
    found = []
    for name in names:
        wrap, options = FSDP_VARIANTS[name]
        with counted_collectives() as expected:
            plain, _ = train(wrap, look=gathered_bytes, **options)
        assert expected["all_gather_single"], "nothing was gathered: this counts nothing"
        for fit in fits(name, names):
            with counted_collectives() as count:
                fitted, summary = train(wrap, fit, look=gathered_bytes, **options)
            if "fitting" not in options:
                assert_replayed(summary)
            looks = [step[key] for step in fitted for key in step if key.startswith("look")]
            assert looks == [step[key] for step in plain for key in step if key.startswith("look")]
            found.append(f"{name}, fitted {fit}: {equal(without_looks(fitted), without_looks(plain)) or 'equal'}")
            assert count == expected, (name, fit, count, expected)
    return found


def without_looks(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in step.items() if not key.startswith("look")} for step in steps]


def test_fsdp2_computes_what_it_computes_alone(equal_runs):
    """Gradients to the last bit, as many collectives as without Memfit, and no gathered parameter is kept alive."""
    for found in values(equal_runs("fsdp")):
        assert [line for line in found if not line.endswith(": equal")] == []
        assert len(found) == len(FSDP_VARIANTS)


def test_fsdp2_on_four_ranks(four_ranks):
    """A mesh of 2 x 2: replicated and sharded."""
    for found in values(four_ranks("four fsdp")):
        assert [line for line in found if not line.endswith(": equal")] == []
        assert len(found) == 3


def shard_inside(model: Any) -> Any:
    """Parts of a block are gathered and freed on their own while it runs."""
    for block in model.blocks:
        fully_shard(block.down)
        fully_shard(block)
    return fully_shard(model)


def shard_reading(model: Any) -> Any:
    """Blocks whose Python reads a number: they cannot be replayed as a whole."""
    for block in model.blocks:
        block.forward = partial(reading, block.forward)
    return shard(model)


def reading(forward: Any, x: torch.Tensor) -> torch.Tensor:
    return forward(x) * (1.0 if x.sum().item() < 1e9 else 2.0)


def tensor_parallel(model: Any, mesh: Any = None) -> Any:
    """The MLPs of blocks are split over ranks, with a reduction in every forward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for block in model.blocks:
        plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    return model


def tensor_and_data_parallel(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return shard(tensor_parallel(model, mesh["tensor"]), mesh=mesh["data"])


ODD: dict[str, tuple[Wrap, str]] = {
    "shards inside": (shard_inside, "descent"),
    "reading": (shard_reading, "descent"),
    "tensor parallel": (tensor_parallel, "fallback"),
    "tensor and data parallel": (tensor_and_data_parallel, "fallback"),
}
"""What cannot be replayed as a whole, and what becomes of it."""


def compare_odd(names: list[str]) -> list[str]:
    found = []
    for name in names:
        wrap, mode = ODD[name]
        split = dist.get_world_size() // 2 if "tensor" in name else dist.get_world_size()
        batches = dist.get_rank() * split // dist.get_world_size()  # ranks that share a block see one batch
        runs: list[Any] = []
        for fit in ("", "after"):
            calls: Counter[str] = Counter()
            with counted_collectives() as count:
                steps, summary = train(partial(counted_calls, wrap, calls), fit, batches=batches, one_by_one=True)
            runs.append((steps, summary, count, calls["up"]))
        (plain, _, expected, once), (fitted, summary, count, times) = runs
        assert [b["mode"] for b in summary["blocks"] if b["name"].count(".") == 1] == [mode] * 3, summary["blocks"]
        if mode == "descent":
            assert sum(b["recomputed_bytes"] or 0 for b in summary["blocks"]) > 0, summary["blocks"]
            assert count == expected
            assert times == once + (3 if name == "reading" else 0)  # the first step, before the blocks were split
        else:
            assert times == 2 * once
        found.append(f"{name}: {equal(fitted, plain) or 'equal'}")
    return found


def counted_calls(wrap: Wrap, calls: Counter[str], model: Any) -> nn.Module:
    """Count how often one layer of the blocks runs."""
    for block in model.blocks:
        block.up.register_forward_hook(lambda module, args, output: calls.update(["up"]))
    return wrap(model)


def test_blocks_that_cannot_be_replayed_as_a_whole(two_ranks):
    """Sharded inside, or reading data: their parts are replayed, nothing is gathered twice. DTensors: run again."""
    for found in values(two_ranks("odd")):
        assert found == [f"{name}: equal" for name in ("shards inside", "reading", "tensor parallel")]


def test_tensor_parallel_blocks_sharded_over_other_ranks(four_ranks):
    assert values(four_ranks("four odd")) == [["tensor and data parallel: equal"]] * 4


# Ranks agree ----------------------------------------------------------------------------------------------------------


def agree(kind: str, accumulate: int = 1) -> dict[str, Any]:
    """Train with a budget; what the plan is, and who made it."""
    rank = dist.get_rank()
    ballast = torch.ones(rank * 48 * 2**18)  # the higher the rank, the more lies outside the blocks
    torch.manual_seed(rank)
    model = make_model(width=64, num_blocks=4)
    wrapped = shard(model) if kind == "fsdp" else DDP(model)
    handle = memfit.fit(wrapped, budget="min")
    optimizer = torch.optim.AdamW(wrapped.parameters())
    plans = []
    for step in range(4 * accumulate):
        ids = make_batch(step)
        loss_of(wrapped(ids), ids).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        plans.append(None if handle.plan is None else handle.plan.to_json())
    found = {
        "plans": plans,
        "policies": [] if handle.plan is None else [str(p) for p in handle.plan.policies],
        "peak": handle.profile and max(event.outside_bytes for event in handle.profile.events),
        "predicted": handle._planned.active and handle._planned.active.raw_peak,
        "notes": handle.summary()["notes"],
        "ballast": ballast.numel(),
    }
    handle.remove()
    return found


@pytest.mark.parametrize("name", ["agree fsdp", "agree accumulate", "four agree"])
def test_one_plan_from_the_worst_rank(name, two_ranks, four_ranks):
    """All ranks run what rank 0 made from the highest numbers, again when the optimizer's state is there."""
    found = values((four_ranks if name.startswith("four") else two_ranks)(name))
    assert len({str(each["policies"]) for each in found}) == 1
    assert len({each["predicted"] for each in found}) == 1
    assert found[0]["predicted"] >= max(each["peak"] for each in found) > found[0]["peak"]
    for each in found:
        assert any(f"{len(found)} ranks run one plan" in note for note in each["notes"]), each["notes"]


def other_names() -> None:
    """Rank 1's model has the same shapes under another name: DDP does not mind."""
    model = make_model()
    if dist.get_rank() == 1:
        model.add_module("spare", model.other)
        model.other = nn.Identity()
        model.uses_other = False
        model.head.register_forward_hook(lambda module, args, output: output + model.spare(*args))
    else:
        model.uses_other = True
    handle = memfit.fit(model, **FULL)
    wrapped = DDP(model)
    for step in range(3):
        ids = make_batch(step)
        loss_of(wrapped(ids), ids).backward()
    handle.remove()


def test_another_model_on_one_rank_stops_all(two_ranks):
    for rank, outcome in enumerate(two_ranks("another model")):
        assert outcome.error.startswith("RankError: Rank 0 trains Model ("), (rank, outcome.error, outcome.trace)
        assert "rank 1 trains Model (" in outcome.error
        assert outcome.seconds < 30


def no_plan() -> None:
    """A budget that the weights fit into, and the process does not."""
    wrapped = DDP(make_model())
    memfit.fit(wrapped, budget="64MiB")
    for step in range(2):
        ids = make_batch(step)
        loss_of(wrapped(ids), ids).backward()


def test_where_no_plan_fits_all_ranks_say_so(two_ranks):
    outcomes = two_ranks("no plan")
    assert len({outcome.error for outcome in outcomes}) == 1
    assert outcomes[0].error.startswith("InfeasibleBudgetError: No plan fits 64.0 MiB"), outcomes[0]


def lengths_by_rank() -> dict[str, Any]:
    """Rank 1 pads to other lengths, now and then."""
    lengths = (12, 12, 9, 12, 15, 12) if dist.get_rank() == 0 else (9, 12, 15, 12, 12, 18)
    plain, _ = train(DDP, lengths=lengths, steps=8)
    fitted, summary = train(DDP, "before", lengths=lengths, steps=8, fitting={"budget": "min"})
    return {"difference": equal(fitted, plain), "notes": summary["notes"]}


def test_ranks_of_other_shapes_decide_alone(two_ranks):
    outcomes = two_ranks("lengths")
    for outcome in outcomes:
        assert outcome.seconds < 30, outcome
    for found in values(outcomes):
        assert found["difference"] == ""
        assert any("decides alone: rank 1 ran another program" in note for note in found["notes"]), found


def runs_out(failing: int) -> list[str]:
    """Rank 1 runs out of memory alone, in the forward of step ``failing``, and tries half of the batch."""

    def once(fitted: bool) -> list[dict[str, Any]]:
        torch.manual_seed(dist.get_rank())
        model = make_model()
        armed = []

        def fail(module: nn.Module, args: Any, output: Any) -> None:
            if armed:
                raise torch.OutOfMemoryError(armed.pop())

        model.blocks[1].down.register_forward_hook(fail)
        handle = memfit.fit(model, **FULL) if fitted else None
        wrapped = DDP(model, broadcast_buffers=False)  # else the second forward hangs without Memfit too
        optimizer = torch.optim.AdamW(wrapped.parameters())
        found = []
        for step in range(5):
            ids = make_batch(step)
            if step == failing and dist.get_rank() == 1:
                armed.append("out of memory")
            torch.manual_seed(step)
            try:
                loss = loss_of(wrapped(ids), ids)
            except torch.OutOfMemoryError:
                torch.manual_seed(step)
                loss = loss_of(wrapped(ids[:2]), ids[:2])
            loss.backward()
            found.append({n: whole(p.grad) for n, p in wrapped.named_parameters()})
            optimizer.step()
            optimizer.zero_grad()
        assert not armed
        if handle is not None:
            handle.remove()
        return found

    return [equal(once(True), once(False))]


@pytest.mark.parametrize("name", ["runs out 0", "runs out 1"])
def test_memory_that_runs_out_on_one_rank_hangs_nobody(name, two_ranks):
    outcomes = two_ranks(name)
    assert values(outcomes) == [[""], [""]]
    assert max(outcome.seconds for outcome in outcomes) < 30


def late(kind: str) -> list[str]:
    """After its first step rank 1 is late, or ends."""
    patience, ranks.TIMEOUT_SECONDS = ranks.TIMEOUT_SECONDS, 2.0
    model = make_model()
    handle = memfit.fit(model, budget="min")
    wrapped = DDP(model, broadcast_buffers=False, find_unused_parameters=True)  # else DDP itself waits in the forward
    for step in range(4):
        ids = make_batch(step)
        loss_of(wrapped(ids), ids).backward()
        if step == 0 and dist.get_rank() == 1:
            if kind == "ends":
                raise KeyError("a bug of one rank")
            time.sleep(5)
    notes = handle.summary()["notes"]
    handle.remove()
    ranks.TIMEOUT_SECONDS = patience
    return list(notes)


def test_a_late_rank_is_not_waited_for(two_ranks):
    for notes in values(two_ranks("late")):
        assert any("decides alone: rank 1 did not come to this point within 2 s" in note for note in notes), notes


def test_a_rank_that_ended_is_not_waited_for():
    """The other one gets the process group's error."""
    first, second = run(late, "ends")
    assert "KeyError" in second.error
    assert not first.killed
    assert "RuntimeError" in first.error, first
    assert first.seconds < 30


def spoil_when_gathered(module: Any, args: Any, output: torch.Tensor) -> None:
    """What FSDP2 gathers for the backward is changed on this rank alone."""

    def spoil(gradient: torch.Tensor) -> None:
        module.gate.weight.data.mul_(1.5)

    output.register_hook(spoil)


def wrong_value(kind: str) -> dict[str, Any]:
    """In step 3, rank 1 changes a weight behind autograd's back, between forward and backward."""
    accumulate = 2 if kind == "no_sync" else 1
    if kind == "switched off":
        ranks.Ranks.defer = lambda self, error: False
    found: dict[str, Any] = {"errors": []}
    for fitted in (False, True):
        torch.manual_seed(dist.get_rank())
        model = make_model()
        wrapped = shard(model) if kind == "fsdp" else DDP(model)
        handle = memfit.fit(wrapped, **FULL) if fitted else None
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
        torch.manual_seed(100 + dist.get_rank())
        for step in range(6):
            for part in range(accumulate):
                ids = make_batch(step * accumulate + part)
                weight = model.blocks[1].gate.weight
                quiet = contextlib.nullcontext() if part == accumulate - 1 else wrapped.no_sync()
                before, spoilt = None, None
                with quiet:
                    if step == 3 and kind == "fsdp" and dist.get_rank() == 1:
                        spoilt = model.blocks[1].register_forward_hook(spoil_when_gathered)
                    loss = loss_of(wrapped(ids), ids)
                    if step == 3 and part == 0 and kind != "fsdp" and dist.get_rank() == 1:
                        before = whole(weight)
                        weight.data.mul_(1.5)
                    loss.backward()
                    if spoilt is not None:
                        spoilt.remove()
                    if before is not None:
                        weight.data.copy_(before)
            try:
                if step == 3 and not fitted:
                    raise InterruptedError("this step is dropped")
                optimizer.step()
            except (memfit.errors.RecomputeError, memfit.errors.RankError) as error:
                found["errors"].append(f"{step} {type(error).__name__}: {error}")
            except InterruptedError:
                pass
            optimizer.zero_grad()
        found["fitted" if fitted else "plain"] = [whole(p) for p in model.parameters()]
        if handle is not None:
            handle.remove()
    return found


@pytest.mark.parametrize("kind", ["ddp", "no_sync", "fsdp"])
def test_a_wrong_value_on_one_rank_stops_the_step_of_all(kind, two_ranks):
    """No rank is left in a collective, none steps, and all can go on: as if the step had been left out."""
    found = values(two_ranks(f"wrong {kind}"))
    assert len(found[0]["errors"]) == len(found[1]["errors"]) == 1
    assert found[0]["errors"][0].startswith("3 RankError: Rank 1 recomputed a wrong value")
    assert found[1]["errors"][0].startswith("3 RecomputeError: In `blocks.1`")
    for each in found:
        for mine, theirs in zip(each["fitted"], each["plain"], strict=True):
            assert torch.equal(mine, theirs)


def test_without_that_the_others_are_left_in_their_collective():
    """The rule switched off: rank 0 fails because rank 1 is gone, or would wait for ever."""
    first, second = run(wrong_value, "switched off", deadline=40)
    assert "RecomputeError" in second.error
    assert first.killed or "RuntimeError" in first.error, first


def two_models() -> dict[str, Any]:
    """An actor and a critic with budgets of their own, updated in turn, the critic twice as often."""

    def once(fitted: bool) -> dict[str, Any]:
        torch.manual_seed(dist.get_rank())
        models = [DDP(make_model()), DDP(make_model(num_blocks=2))]
        handles = [memfit.fit(model, budget="min") for model in models] if fitted else []
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
        steps = []
        torch.manual_seed(100 + dist.get_rank())
        for step in range(9):
            which = 0 if step % 3 == 0 else 1
            ids = make_batch(step)
            with torch.no_grad():
                models[1 - which](ids)
            loss_of(models[which](ids), ids).backward()
            steps.append({n: whole(p.grad) for n, p in models[which].named_parameters()})
            optimizers[which].step()
            optimizers[which].zero_grad()
        notes = [note for handle in handles for note in handle.summary()["notes"]]
        for handle in handles:
            handle.remove()
        return {"steps": steps, "notes": notes}

    plain, fitted = once(False), once(True)
    return {"difference": equal(fitted["steps"], plain["steps"]), "notes": fitted["notes"]}


def test_an_actor_and_a_critic_agree_each_for_itself(two_ranks):
    for found in values(two_ranks("two models")):
        assert found["difference"] == ""
        assert sum("2 ranks run one plan" in note for note in found["notes"]) == 2, found["notes"]


EQUAL: dict[str, Callable[[], Any]] = {
    "ddp": partial(compare_ddp, list(DDP_VARIANTS)),
    "accelerate": accelerated,
    "fsdp": partial(compare_fsdp, [name for name in FSDP_VARIANTS if name != "hybrid"]),
}
TWO: dict[str, Callable[[], Any]] = {
    "odd": partial(compare_odd, ["shards inside", "reading", "tensor parallel"]),
    "agree fsdp": partial(agree, "fsdp"),
    "agree accumulate": partial(agree, "ddp", 2),
    "another model": other_names,
    "no plan": no_plan,
    "lengths": lengths_by_rank,
    "runs out 0": partial(runs_out, 0),
    "runs out 1": partial(runs_out, 1),
    "late": partial(late, "late"),
    "wrong ddp": partial(wrong_value, "ddp"),
    "wrong no_sync": partial(wrong_value, "no_sync"),
    "wrong fsdp": partial(wrong_value, "fsdp"),
    "two models": two_models,
    "plans by mesh": plans_by_mesh,
}
FOUR: dict[str, Callable[[], Any]] = {
    "four ddp": partial(compare_ddp, ["plain", "accumulate"]),
    "four fsdp": partial(compare_fsdp, ["blocks", "hybrid"]),
    "four odd": partial(compare_odd, ["tensor and data parallel"]),
    "four agree": partial(agree, "ddp"),
}
SCENARIOS = EQUAL | TWO | FOUR
