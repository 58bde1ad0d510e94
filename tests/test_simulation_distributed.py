"""Several devices that are not there: FSDP2, DDP and ZeRO in a rehearsed step, and what cannot be asked for."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

import memfit
from memfit import cli, hardware
from memfit.errors import InfeasibleBudgetError, ModelError, UsageError
from memfit.forecast import Forecast
from memfit.parallelism import Parallelism, parallelism
from memfit.simulation.fakes import fake_tensors
from memfit.simulation.gathering import Settings
from memfit.simulation.parallel import process_group
from memfit.simulation.rehearsal import Rehearsal
from memfit.simulation.results import Rehearsed
from memfit.simulation.teams import notes_of
from memfit.simulation.traffic import Traffic
from memfit.simulation.zero3 import Order, Zero3
from memfit.solver.planner import switched
from rehearsing import make_model, num_passed_over, rehearse, rehearse_team

SIZES = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4}
CONFIG = transformers.LlamaConfig(
    **SIZES, num_hidden_layers=5, num_key_value_heads=2, use_cache=False, architectures=["LlamaForCausalLM"]
)
BLOCK = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 344 * 128 + 2 * 128) // 2
"""Elements of a block's parameters."""
WHOLE = 5 * BLOCK + 2 * 1000 * 128 + 128
STEP = {"batch_size": 2, "length": 64, "precision": "fp32", "device": "cpu"}


def forecast(num_devices: int = 4, **options) -> Forecast:
    options.setdefault("compares", False)
    return Forecast(CONFIG, num_devices=num_devices, **{**STEP, **options})


def plain(found: Forecast) -> int:
    return switched(found.profile, policy="plain", **found.named).predicted_peak_bytes


def test_a_shard_of_everything_is_left():
    """Of weights, gradients and optimizer state each of four devices holds a quarter; one block is whole at a time."""
    found = forecast(fsdp="full")
    parts, events = found.within("min").peak.parts, found.profile.events
    batch_and_buffers = 2 * 2 * 64 * 8 + 2 * 16 * 4
    assert parts["weights"] == 4 * WHOLE // 4 + batch_and_buffers
    states = 2 * 4 * WHOLE // 4
    assert states <= parts["optimizer_state"] <= states + 4 * 64, "a step count for each parameter"
    gathered = [event for event in events if event.name.startswith("before the backward of")]
    assert [event.live_calls for event in gathered][-3:] == [(0, 1, 2), (0, 1), (0,)]
    assert [event.live_calls for event in events if event.name == "end of backward"] == [()]


def test_uneven_shards_are_padded():
    """Over 48 devices rows do not come out even: rank 0 has the largest shards."""
    rows = {(128, 128): 2, (64, 128): 2, (344, 128): 2, (128, 344): 1}
    block = sum(count * -(-shape[0] // 48) * shape[1] for shape, count in rows.items()) + 2 * -(-128 // 48)
    whole = 5 * block + 2 * -(-1000 // 48) * 128 + -(-128 // 48)
    parts = forecast(48, fsdp="full").within("min").peak.parts
    assert parts["weights"] == 4 * whole + 2 * 2 * 64 * 8 + 2 * 16 * 4


@pytest.mark.parametrize("how", [{"fsdp": "full"}, {"fsdp": "grad"}, {"fsdp": "hybrid:2"}, {"ddp": True}, {"zero": 2}])
def test_equal_blocks_are_passed_over_without_a_trace(how):
    """With gathers and reductions around them."""
    chosen = parallelism(4, **how)
    (first, doubled, team), (second, whole, other) = (rehearse(CONFIG, chosen, doubles=each) for each in (True, False))
    assert [num_passed_over(each) for each in (doubled, whole)] == [2, 0]
    assert not any(each.differs for each in (doubled, whole))
    assert first.profile.events == second.profile.events
    assert first.profile.programs.keys() == second.profile.programs.keys()
    assert first.gradients == second.gradients
    assert team.traffic.sent_bytes == other.traffic.sent_bytes > 0
    assert first.step_seconds == pytest.approx(second.step_seconds, rel=0.02)


def rehearse_zero3(num_devices: int = 4, **options) -> tuple[Rehearsal, Zero3, Rehearsed]:
    """A rehearsal that knows the order of the one before."""
    order: Order | None = None
    with fake_tensors():
        model = make_model(CONFIG)
        for again in (False, options.pop("runs_again", False)):
            traffic, chosen = Traffic(hardware.find("h100"), num_devices), parallelism(num_devices, zero=3)
            team = Zero3(chosen, traffic, order=order, runs_again=again, settings=options.get("settings"))
            found, rehearsal = rehearse_team(team, model, doubles=options.get("doubles", True))
            order = team.order
    return rehearsal, team, found


TIGHT = Settings(bucket=128 * 128, prefetch=30_000, persistence=128, reuse=100_000)
"""Blocks leave after their forward, and are gathered ahead."""


@pytest.mark.parametrize("settings", [None, TIGHT])
@pytest.mark.parametrize("runs_again", [False, True])
def test_gathers_of_equal_blocks_are_passed_over_without_a_trace(settings, runs_again):
    """As many gathers in the same order; within blocks what is gathered for a moment may come a moment later."""
    first, team, found = rehearse_zero3(settings=settings, runs_again=runs_again)
    second, other, whole = rehearse_zero3(settings=settings, runs_again=runs_again, doubles=False)
    assert [num_passed_over(each) for each in (first, second)] == [2, 0]
    assert team.order.modules == other.order.modules
    assert team.traffic.sent_bytes == other.traffic.sent_bytes > 0
    assert found.profile.programs.keys() == whole.profile.programs.keys()
    for mine, its in zip(found.profile.events, whole.profile.events, strict=True):
        assert (mine.name, mine.live_calls) == (its.name, its.live_calls)
        assert mine.outside_bytes == pytest.approx(its.outside_bytes, rel=0.01)


def test_what_zero_3_sends():
    """Each weight gathered for its forward and, where it has left, for its backward; gradients once; norms once."""
    ring, norms = 3 / 4, 11 * 128
    _, kept, _ = rehearse_zero3()
    assert kept.traffic.sent_bytes == ring * 4 * ((WHOLE - norms) + WHOLE + norms)
    everything = Settings(bucket=128 * 128, prefetch=0, persistence=0, live=0, reuse=0)
    _, gone, _ = rehearse_zero3(settings=everything)
    assert gone.traffic.sent_bytes == ring * 4 * 3 * WHOLE
    _, again, _ = rehearse_zero3(settings=everything, runs_again=True)
    last = 344 * 128  # is there already, for the backward of the module that begins it
    assert again.traffic.sent_bytes == ring * 4 * (3 * WHOLE + 5 * (BLOCK - last))


def test_a_shard_of_everything_is_left_by_zero_3():
    """Weights, gradients and fp32 weights in quarters, moments too; of 4-byte weights DeepSpeed keeps both copies."""
    parts = forecast(zero=3).within("min").peak.parts
    assert parts["weights"] == 2 * 4 * WHOLE // 4 + 2 * 2 * 64 * 8 + 2 * 16 * 4
    assert parts["gradients"] >= 4 * WHOLE // 4
    assert parts["optimizer_state"] == 2 * 4 * WHOLE // 4 + 4
    uneven = forecast(48, zero=3).within("min").peak.parts
    sizes = [1000 * 128] * 2 + [128] * 11 + ([128 * 128] * 2 + [64 * 128] * 2 + [344 * 128] * 3) * 5
    assert uneven["weights"] == 2 * 4 * sum(-(-size // 48) for size in sizes) + 2 * 2 * 64 * 8 + 2 * 16 * 4


def test_recipes_read_no_weights_that_zero_3_takes_away():
    """What a matrix product made is kept, unless a block runs again as a whole: that is the smallest plan, as live."""
    found = forecast(zero=3, length=512)
    (program,) = found.profile.programs.values()
    products = [op for op in program.ops if op.name in ("aten.mm.default", "aten.addmm.default")]
    assert len(products) == 7
    assert not any(op.recomputable for op in products)
    assert any(op.recomputable for op in program.ops)
    smallest, recipes = found.solve("min"), switched(found.profile, policy="full")
    assert not {call.program for call in smallest.calls} & found.profile.programs.keys()
    assert smallest.predicted_peak_bytes < recipes.predicted_peak_bytes < smallest.plain_peak_bytes
    between = found.solve(recipes.predicted_peak_bytes)
    assert {call.program for call in between.calls} == found.profile.programs.keys()
    below = recipes.predicted_peak_bytes - 1
    assert found.solve(below).predicted_peak_bytes <= below
    with pytest.raises(InfeasibleBudgetError):
        found.solve(smallest.predicted_peak_bytes - 1)
    prediction = found.within("min")
    rows = {row.name: row.peak_bytes for row in prediction.alternatives}
    assert rows["nothing"] > rows["full checkpointing"] == prediction.peak.expected
    assert any("no plan file" in sentence for sentence in prediction.not_counted)


def test_what_is_sent():
    """Around a ring, of 4 devices: 3/4 of a buffer; DDP reduces all gradients, FSDP2 gathers blocks twice."""
    sent = {}
    for name, how in {"ddp": {"ddp": True}, "fsdp": {"fsdp": "full"}, "zero": {"zero": 1}}.items():
        *_, team = rehearse(CONFIG, parallelism(4, **how))
        sent[name] = team.traffic.sent_bytes
    outside = 2 * 1000 * 128 + 128
    buffers = 2 * 16 * 4  # DDP broadcasts them before each forward
    assert sent["ddp"] == 3 / 4 * (2 * 4 * WHOLE + buffers)
    assert sent["fsdp"] == 3 / 4 * 4 * (3 * 5 * BLOCK + 2 * outside)
    assert sent["zero"] == pytest.approx(3 / 4 * 4 * 3 * WHOLE, rel=1e-4), "all-reduced, then gathered"


def test_what_is_sent_takes_time_where_nothing_hides_it():
    """Transfers queue up beside the computation, which waits for what it has asked for, and in the end for all."""
    entry = hardware.find("h100")
    rate = entry.interconnect_bytes_per_second * entry.copy_efficiency
    traffic = Traffic(entry, 2)
    second = 2 * (rate - rate * entry.launch_seconds)  # halved by the ring, and a launch
    traffic.send(3 * second - 2 * rate * (3 * entry.launch_seconds - entry.launch_seconds), 0.0, key=7, early=True)
    traffic.wait(7, 1.0)  # 3 s, of which the computation has hidden 1
    traffic.send(second, 4.0)  # is over at 4 + 2 + 1
    traffic.settle(4.5)
    assert traffic.exposed_seconds([]) == pytest.approx(2 + 0.5, rel=1e-3)
    assert traffic.exposed_seconds([10.0]) == pytest.approx(2 + 0.5, rel=1e-3), "no backward had begun"


def test_what_leaves_a_machine_takes_the_network():
    """A ring of 16 runs eight times, over 50 GB/s each; one of a device in each machine once."""
    entry = hardware.find("h100")
    for ring, rate in ((range(16), 8 * 50e9), (range(0, 16, 8), 50e9), (range(8), 450e9)):
        traffic = Traffic(entry, 16)
        traffic.send(1e9, 0.0, ranks=ring)
        traffic.settle(0.0)
        moved = 1e9 * (len(ring) - 1) / len(ring)
        assert traffic.exposed_seconds([]) == pytest.approx(
            moved / (rate * entry.copy_efficiency) + entry.launch_seconds
        )


@pytest.mark.parametrize(
    ("number", "device", "sentence"),
    [
        (64, "h100", "8 machines of 8 devices are taken to be joined by 50 GB/s for each device (NVIDIA DGX H100"),
        (16, "a100-80gb", "2 machines of 8 devices are taken to be joined by 25 GB/s for each device (NVIDIA DGX A100"),
        (8, "h100", "8 devices are taken to be in one"),
        (
            16,
            "rtx4090",
            "`rtx4090` has no rate for one, so all 16 devices are taken to be linked as those of one machine",
        ),
        (16, "cpu", "`cpu` has no rate for its links"),
    ],
)
def test_what_is_assumed_of_machines_is_said(number, device, sentence):
    (found,) = [note for note in notes_of(parallelism(number, ddp=True), hardware.find(device)) if sentence in note]
    assert found.endswith(".")


def test_more_devices_take_less_each():
    alone, few, many = plain(forecast(1)), plain(forecast(2, fsdp="full")), plain(forecast(8, fsdp="full"))
    assert many < few < alone
    assert plain(forecast(8, ddp=True)) == pytest.approx(alone + 4 * WHOLE, rel=1e-4), "buckets"
    assert plain(forecast(8, zero=2)) <= plain(forecast(8, zero=1)) < alone
    assert many < plain(forecast(8, fsdp="grad"))
    assert many < plain(forecast(8, fsdp="hybrid:2"))
    assert plain(forecast(8, zero=3)) < plain(forecast(2, zero=3))


def test_gradients_that_are_moved_leave_the_working_set():
    """Those of parameters, by their size; what is freed anyway, and the input's gradient, stay as they are."""
    found = forecast(4, zero=2).profile.programs
    sizes = [4 * 128 * 128] * 2 + [4 * 64 * 128] * 2 + [4 * 344 * 128] * 3 + [4 * 128] * 2
    whole = forecast(4, zero=1).profile.programs
    assert found.keys() == whole.keys()
    for key, program in found.items():
        events = iter(program.timeline)
        gone = []
        for event in whole[key].timeline:
            mine = next(events)
            assert mine == event
            if event.kind == "alloc" and event.index not in {e.index for e in whole[key].timeline if e.kind == "free"}:
                if event.size in sizes and gone.count(event.size) < sizes.count(event.size):
                    gone.append(next(events).size)
        assert sorted(gone) == sorted(sizes)
        assert next(events, None) is None


def test_mixed_precision_gathers_in_half():
    """The shards are fp32, what is gathered and reduced is not; DeepSpeed's weights are half all the time."""
    whole = forecast(4, fsdp="full").within("min").peak.parts
    mixed = forecast(4, fsdp="full", precision="bf16-mixed").within("min").peak.parts
    assert mixed["weights"] == whole["weights"]
    assert mixed["outside_blocks"] < 0.7 * whole["outside_blocks"]
    zero = forecast(4, zero=2, precision="bf16-mixed").within("min").peak.parts["weights"]
    assert zero == pytest.approx((2 + 4 / 4) * WHOLE, rel=0.01)


def test_plans_say_for_whom_they_are():
    found = forecast(4, fsdp="full").within("min").plan
    assert (found.world_size, found.mesh) == (4, (4,))
    assert forecast(4, fsdp="hybrid:2").within("min").plan.mesh == (2, 2)
    assert (forecast(4, ddp=True).within("min").plan.world_size, forecast(4).within("min").plan.world_size) == (4, 1)


def test_nothing_is_left_behind():
    """No process group, no hook on exceptions, no patched storage."""
    shown, resize = sys.excepthook, torch.UntypedStorage.resize_
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    for how in ({"fsdp": "full"}, {"ddp": True}, {"zero": 2}, {"zero": 3}):
        memfit.simulate(model, torch.zeros(8, 64), loss=lambda output, batch: output.sum(), num_devices=2, **how)
        assert not dist.is_initialized()
    assert sys.excepthook is shown
    assert torch.UntypedStorage.resize_ is resize
    assert "resize_" not in vars(torch.UntypedStorage)
    assert all(type(p) is nn.Parameter and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_process_that_is_a_rank_already():
    with process_group(parallelism(2, ddp=True)), pytest.raises(UsageError, match="a rank of a process group already"):
        forecast(4, ddp=True)


@pytest.mark.parametrize(
    ("devices", "options", "message"),
    [
        (1, {"fsdp": "full"}, "needs several devices, and there is 1"),
        (1, {"ddp": True}, "needs several devices"),
        (1, {"tp": 2}, "`tp` needs several devices"),
        (8, {"fsdp": "half"}, "no FSDP strategy `half`"),
        (8, {"fsdp": "hybrid:3"}, "do not make several groups of 3"),
        (8, {"fsdp": "hybrid:8"}, "do not make several groups of 8"),
        (8, {"zero": 4}, "no ZeRO stage `4`"),
        (8, {"zero": 0}, "no ZeRO stage `0`"),
        (8, {"ddp": True, "fsdp": "full"}, "`ddp` and `fsdp` do not go together"),
        (8, {"fsdp": "full", "zero": 1}, "`fsdp` and `zero` do not go together"),
        (8, {"tp": 3}, "`tp=3` does not divide 8 devices"),
        (8, {"tp": 0}, "`tp=0` is no number"),
        (8, {"tp": 8, "fsdp": "full"}, "`fsdp` and `tp` do not go together where `tp=8` takes all 8 devices"),
        (8, {"tp": 8, "ddp": True}, "`ddp` and `tp` do not go together where `tp=8` takes all 8 devices"),
        (8, {"tp": 2, "zero": 1}, "`zero` and `tp` do not go together"),
        (8, {"tp": 2, "ddp": True, "fsdp": "full"}, "`ddp` and `fsdp` do not go together"),
        (8, {"tp": 2, "fsdp": "hybrid:4"}, "4 groups of 2 devices do not make several groups of 4"),
    ],
)
def test_what_cannot_be(devices, options, message):
    with pytest.raises(UsageError, match=message):
        parallelism(devices, **options)


def test_words():
    assert parallelism(8) == Parallelism(num_devices=8)
    assert parallelism(8, tp=1, fsdp="grad").words == "FSDP2 of gradients and state over 8 devices"
    assert parallelism(8, fsdp="hybrid:4").mesh == (2, 4)
    split = parallelism(8, tp=8)
    assert (split.words, split.mesh) == ("tensor parallel over 8 devices", (8,))
    assert (split.num_batches, parallelism(8, ddp=True).num_batches) == (1, 8)
    groups = parallelism(8, tp=2)
    assert (groups.words, groups.mesh) == ("tensor parallel over 2 devices in 4 groups", (4, 1, 2))
    assert groups == parallelism(8, tp=2, ddp=True)
    assert groups.num_batches == 4
    sharded = parallelism(8, tp=2, fsdp="full")
    assert (sharded.words, sharded.mesh) == ("FSDP2 over 4 groups of 2 tensor parallel devices", (4, 2))
    assert sharded.num_batches == 4
    hybrid = parallelism(8, tp=2, fsdp="hybrid:2")
    assert hybrid.words == "FSDP2 in groups of 2 over 4 groups of 2 tensor parallel devices"
    assert hybrid.axes == {"replicate": 2, "shard": 2, "tp": 2}
    assert parallelism(8, zero=3).words == "ZeRO-3 over 8 devices"


def test_a_sharded_head_has_no_chunked_loss():
    with pytest.raises(ModelError, match="head's weight, which is sharded"):
        forecast(4, fsdp="full", chunked_loss=True)
    with pytest.raises(ModelError, match="head's weight, which is sharded"):
        forecast(4, zero=3, chunked_loss=True)


@pytest.mark.parametrize("words", [["--fsdp", "full"], ["--gpus", "4xh100", "--ddp", "--zero", "1"]])
def test_the_command_line_says_so(words, capsys):
    assert cli.main(["plan", "gpt2", *words]) == 2
    assert "`" in capsys.readouterr().err
