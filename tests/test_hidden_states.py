"""Hidden-state offload: full checkpointing with the blocks' inputs on the host, against sums by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from memfit.cli import main
from memfit.profiles import Node, OpCost
from memfit.solver.hidden_states import offload_plan
from memfit.solver.peak import simulate
from memfit.solver.planner import switched
from programs import chain_step, llama_block, program, release_at_once

FORWARD, BACKWARD, AGAIN = 2.0, 4.0, 2.0  # seconds of `block`


def block(*, size: int, keeps_input: bool = True):
    """An input of ``size`` bytes and one saved value of 50; its backward needs 7 bytes beside them."""
    nodes = [
        Node(storage_bytes=size, kind="input", keep_bytes=size if keeps_input else 0),
        Node(storage_bytes=50, num_saved=1, keep_bytes=50),
    ]
    ops = [OpCost(name="f", seconds=FORWARD, inputs=(0,), outputs=(1,))]
    return program(nodes, ops, key=f"b{size}", timeline=release_at_once((1,), {0: 7}), forward_bytes=60)


@pytest.mark.parametrize("in_flight", [1, 2, 3, 9])
def test_every_moment_holds_the_inputs_that_are_in_flight(in_flight):
    """Against a sum by hand over every moment: distinct sizes, so that a wrong input shows."""
    sizes = [1000, 200, 3000, 400, 5000]
    step = chain_step([block(size=size) for size in sizes], outside=10, loss=90)
    plan = offload_plan(step, bytes_per_second=1e9, in_flight=in_flight)
    moments = [10 + 90 + sum(sizes[max(0, len(sizes) - in_flight) :])]
    for number, size in enumerate(sizes):
        beside = 10 + sum(sizes[max(0, number - in_flight + 1) : number])
        moments.append(beside + 60)  # forward: its own input is its caller's
        moments.append(beside + size + 50)  # backward: the value comes back from the input, which goes then
        moments.append(beside + 50 + 7)
    assert plan.predicted_peak_bytes == max(moments)


def test_all_in_flight_is_full_checkpointing():
    step = chain_step([llama_block()] * 6, outside=1000, loss=1 << 28)
    plan = offload_plan(step, bytes_per_second=1e30, in_flight=100)
    full = switched(step, policy="full")
    assert plan.predicted_peak_bytes == full.predicted_peak_bytes
    assert plan.recompute_seconds == pytest.approx(full.recompute_seconds)


def test_copies_cost_what_they_take_longer_than_the_computation_beside_them():
    """6000 bytes: 3 s against 2 of the forward and 6 of backward and recomputation; then 30 s against both."""
    step = chain_step([block(size=6000)] * 4)
    slow = offload_plan(step, bytes_per_second=2000)
    assert slow.recompute_seconds == pytest.approx(4 * (AGAIN + (3 - FORWARD)))
    slower = offload_plan(step, bytes_per_second=200)
    assert slower.recompute_seconds == pytest.approx(4 * (AGAIN + (30 - FORWARD) + (30 - BACKWARD - AGAIN)))
    waits = offload_plan(step, bytes_per_second=2000, overlaps=False)
    assert waits.recompute_seconds == pytest.approx(4 * (AGAIN + 3 + 3))
    fast = offload_plan(step, bytes_per_second=1e9)
    assert fast.recompute_seconds == pytest.approx(4 * AGAIN)


def test_what_somebody_else_holds_cannot_be_moved():
    step = chain_step([block(size=6000, keeps_input=False)] * 4)
    assert offload_plan(step, bytes_per_second=1e9) is None


def test_the_profile_is_left_as_it_was():
    step = chain_step([block(size=6000)] * 4, outside=10)
    before = replace(step)
    plan = offload_plan(step, bytes_per_second=1e9)
    assert step == before
    assert simulate(step, plan).peak_bytes > plan.predicted_peak_bytes


@pytest.fixture
def folder(tmp_path):
    sizes = {"num_hidden_layers": 16, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    sizes |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "max_position_embeddings": 4096}))
    return str(tmp_path)


def alternatives(folder, gpu, capsys):
    main(["plan", folder, "--batch", "8", "--seq", "2048", "--gpu", gpu, "--json"])
    return {each["name"]: each for each in json.loads(capsys.readouterr().out)["alternatives"]}


def test_it_stands_beside_todays_switches(folder, capsys):
    """Fourteen of sixteen inputs of 2 MiB are away at the loss; times are never below those of full checkpointing."""
    found = alternatives(folder, "rtx4090", capsys)
    full, moved = found["full checkpointing"], found["hidden-state offload"]
    size = 8 * 2048 * 64 * 2
    assert (full["peak_bytes"] - moved["peak_bytes"]) == pytest.approx(14 * size * 1.02, abs=64)
    assert moved["step_seconds"] >= full["step_seconds"]


@pytest.mark.parametrize("gpu", ["cpu", "m4-max"])
def test_no_host_link_no_row(folder, gpu, capsys):
    assert "hidden-state offload" not in alternatives(folder, gpu, capsys)
