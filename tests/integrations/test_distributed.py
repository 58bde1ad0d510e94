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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import CLASSES, DEADLINE_SECONDS, equal, loss_of, make_batch, make_model, run, values, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import memfit

STEPS = 5
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
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    torch.manual_seed(100 + dist.get_rank())
    found = []
    for step in range(steps):
        kept: dict[str, Any] = {}
        for part in range(accumulate):
            ids = make_batch(step * accumulate + part, lengths[(step * accumulate + part) % len(lengths)])
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
    """Every block was replayed, and something was dropped."""
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


def compare_ddp(names: list[str]) -> list[str]:
    found = []
    for name in names:
        wrap, options = DDP_VARIANTS[name]
        plain, _ = train(wrap, **options)
        for fit in ("before", "after"):
            fitted, summary = train(wrap, fit, **options)
            if "fitting" not in options:
                assert_replayed(summary)
            found.append(f"{name}, fitted {fit}: {equal(fitted, plain) or 'equal'}")
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_ddp_computes_what_it_computes_alone(ranks):
    """Gradients of every step, synchronised or not; a parameter is never marked as ready twice."""
    names = list(DDP_VARIANTS) if ranks == 2 else ["plain", "unused", "accumulate"]
    for found in values(run(compare_ddp, names, ranks=ranks)):
        assert [line for line in found if not line.endswith(": equal")] == []
        assert len(found) == 2 * len(names)


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


def torchrun(*arguments: str, ranks: int = 2) -> str:
    """What it printed; it has to end well, and in time."""
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
    assert process.returncode == 0, text
    return text


@pytest.mark.parametrize("ranks", [1, 2])
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


def test_accelerate_computes_what_it_computes_alone():
    """Prepared by accelerate: DDP and `no_sync` are its own."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    assert values(run(accelerated)) == [["", ""]] * 2


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


@contextlib.contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Counts the calls of the functions that gather and scatter."""
    count: Counter[str] = Counter()
    names = ("all_gather_single", "reduce_scatter_single", "all_reduce")  # what FSDP2 calls

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return original(*args, **kwargs)

        return call

    originals = {name: getattr(dist, name) for name in names}
    for name, original in originals.items():
        setattr(dist, name, counting(name, original))
    try:
        yield count
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


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
        for fit in ("before", "after"):
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


@pytest.mark.parametrize("ranks", [2, 4])
def test_fsdp2_computes_what_it_computes_alone(ranks):
    """Gradients to the last bit, as many collectives as without Memfit, and no gathered parameter is kept alive."""
    names = [name for name in FSDP_VARIANTS if name != "hybrid"] if ranks == 2 else ["blocks", "hybrid"]
    for found in values(run(compare_fsdp, names, ranks=ranks)):
        assert [line for line in found if not line.endswith(": equal")] == []
        assert len(found) == 2 * len(names)


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
        "predicted": handle._active and handle._active.raw_peak,
        "notes": handle.summary()["notes"],
        "ballast": ballast.numel(),
    }
    handle.remove()
    return found


@pytest.mark.parametrize(("kind", "ranks", "accumulate"), [("ddp", 4, 1), ("fsdp", 2, 1), ("ddp", 2, 2)])
def test_one_plan_from_the_worst_rank(kind, ranks, accumulate):
    """All ranks run what rank 0 made from the highest numbers, again when the optimizer's state is there."""
    found = values(run(agree, kind, accumulate, ranks=ranks))
    assert len({str(each["policies"]) for each in found}) == 1
    assert len({each["predicted"] for each in found}) == 1
    assert found[0]["predicted"] >= max(each["peak"] for each in found) > found[0]["peak"]
    for each in found:
        assert any(f"{ranks} ranks run one plan" in note for note in each["notes"]), each["notes"]
