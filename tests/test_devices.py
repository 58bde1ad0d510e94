"""Models whose layers are on several devices: one budget, plan and peak for each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import memfit
from memfit import memory, ops
from memfit.report.text import render
from memfit.units import Budget, parse_budgets

sys.path.insert(0, str(Path(__file__).parent / "devices"))
import pretended
import scenarios
from pretended import FIRST, SECOND

GIB = 2**30


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("the devices have to be compiled, and there is no g++")
    made_from = Path(pretended.__file__).with_suffix(".cpp").read_bytes() + torch.__version__.encode()
    path = tmp_path_factory.getbasetemp().parent / f"pretended-{sha256(made_from).hexdigest()[:16]}.so"
    if not path.exists():
        pretended.build(path)
    return path


def seen(library: Path, scenario: str) -> Any:
    command = [sys.executable, scenarios.__file__, str(library), scenario]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def budgets(library: Path) -> dict[str, Any]:
    return seen(library, "budgets")


def by_device(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["device"]: each for each in found["summary"]["devices"]}


@pytest.mark.parametrize("name", ["min", "none", "full", "each", "text", "one", "second"])
def test_trains_as_without_memfit(budgets: dict[str, Any], name: str) -> None:
    """Losses and weights are the plain run's to the last bit, and the model is afterwards what it was."""
    found = budgets[name]
    assert found["same"]
    assert found["hooks"][0] == found["hooks"][1]
    assert found["use_cache"] is True


@pytest.mark.parametrize("name", ["each", "text", "one", "second"])
def test_every_device_holds_its_budget(budgets: dict[str, Any], name: str) -> None:
    found = budgets[name]
    for device, own in by_device(found).items():
        assert own["measured_peak_bytes"] <= own["budget_bytes"]
        assert found["peaks"][device] <= own["budget_bytes"]
        assert own["predicted_peak_bytes"] <= own["budget_bytes"]
    assert {row["mode"] for row in found["summary"]["blocks"]} == {"replay"}


def test_the_smallest_peak_is_smaller_on_every_device(budgets: dict[str, Any]) -> None:
    smallest = budgets["min"]
    for device, own in by_device(smallest).items():
        assert smallest["peaks"][device] < 0.65 * smallest["plain_peaks"][device]
        assert own["budget_bytes"] is None
        assert own["measured_peak_bytes"] == pytest.approx(own["predicted_peak_bytes"], rel=0.1)
        assert smallest["peaks"][device] <= min(budgets[name]["peaks"][device] for name in ("none", "each", "full"))


def test_a_device_with_room_recomputes_nothing(budgets: dict[str, Any]) -> None:
    """Chains are split between devices: what is too tight on one costs the other nothing."""
    rows = {row["name"]: row["recomputed_bytes"] for row in budgets["second"]["summary"]["blocks"]}
    assert [rows[f"model.layers.{i}"] for i in range(3)] == [0, 0, 0]
    assert sum(rows[f"model.layers.{i}"] for i in range(3, 6)) > 100_000


@pytest.mark.parametrize("name", ["min", "full", "each"])
def test_no_device_keeps_what_is_on_another(budgets: dict[str, Any], name: str) -> None:
    """A copy between devices is saved where it arrives; else its source would be held there, beside every budget."""
    assert budgets[name]["kept_on"] == {FIRST: [FIRST], SECOND: [SECOND]}


def test_the_summary_adds_up(budgets: dict[str, Any]) -> None:
    found = budgets["each"]["summary"]
    assert found["device"] == f"{FIRST}, {SECOND}"
    for key in ("budget_bytes", "predicted_peak_bytes", "measured_peak_bytes", "plain_peak_bytes"):
        assert found[key] == sum(each[key] for each in found["devices"])
    assert found["saved_bytes"] == sum(row["saved_bytes"] for row in found["blocks"])
    assert [row["name"] for row in found["blocks"]] == [f"model.layers.{i}" for i in range(6)]
    assert found["steps"] == scenarios.STEPS
    assert found["model_flops"] == budgets["none"]["summary"]["model_flops"]


def test_the_report_has_a_line_for_each_device(budgets: dict[str, Any]) -> None:
    lines = budgets["each"]["report"].splitlines()
    assert lines[0].startswith("peak ")
    assert "2 devices together" in lines[0]
    for line, device in zip(lines[1:3], (FIRST, SECOND), strict=True):
        assert line.startswith(f"  {device} ")
        assert " measured (predicted " in line
        assert " at the " in line
    assert render(json.loads(json.dumps(budgets["each"]["summary"]))) == budgets["each"]["report"]


def test_a_chunked_loss_steps_aside_for_accelerates_head(budgets: dict[str, Any]) -> None:
    """It copies its input, and the model's output to where the input was: it reads the logits."""
    assert budgets["chunked"]["same"]
    assert "`chunked_loss` stepped aside: the head's forward is patched" in budgets["chunked"]["summary"]["notes"]


def test_a_device_on_which_nothing_trains(library: Path) -> None:
    """Adapters on the second device only: nothing is saved on the first, and both have their plan."""
    found = seen(library, "adapters")["min"]
    assert found["same"]
    own = by_device(found)
    assert own[FIRST]["measured_peak_bytes"] is not None
    assert found["peaks"][SECOND] < found["plain_peaks"][SECOND]
    rows = {row["name"].rpartition(".")[2]: row for row in found["summary"]["blocks"]}
    assert [rows[str(i)]["saved_bytes"] for i in range(3)] == [0, 0, 0]
    assert all(rows[str(i)]["recomputed_bytes"] for i in range(3, 6))


def test_masks_are_drawn_again_on_their_own_device(library: Path) -> None:
    """A block's input may come from another device, whose generator is not the one that it draws from."""
    found = seen(library, "dropout")["min"]
    assert found["same"]
    assert not found["summary"]["notes"]
    assert {row["mode"] for row in found["summary"]["blocks"]} == {"replay"}
    for device in (FIRST, SECOND):
        assert found["peaks"][device] < 0.65 * found["plain_peaks"][device]


def test_whole_blocks_draw_again_on_their_own_device(library: Path) -> None:
    found = seen(library, "whole_blocks")["min"]
    assert found["same"]
    assert [row["mode"] for row in found["summary"]["blocks"]] == ["fallback"] * 4


def test_a_plan_is_made_and_applied(library: Path) -> None:
    found = seen(library, "planned")
    assert found["clean"]
    assert found["device"] == f"{FIRST}, {SECOND}"
    applied = found["applied"]
    assert applied["same"]
    assert not applied["summary"]["notes"]
    for device in (FIRST, SECOND):
        assert applied["peaks"][device] < 0.65 * applied["plain_peaks"][device]


def test_a_budget_that_one_device_cannot_hold(library: Path) -> None:
    """The error names the device, and the model is unfitted on all."""
    found = seen(library, "infeasible")
    assert found["error"]["event"].endswith(f" on `{SECOND}`")
    assert found["error"]["budget"] == found["given"] < found["error"]["minimum"]
    assert found["hooks"][0] == found["hooks"][1]
    assert found["again"]


def test_a_budget_below_the_weights_of_one_device(library: Path) -> None:
    text = seen(library, "too_small")
    assert f"on `{SECOND}`" in text
    assert "Weights take" in text


def test_a_block_on_two_devices_is_split(library: Path) -> None:
    found = seen(library, "split_block")["min"]
    assert found["same"]
    names = {row["name"] for row in found["summary"]["blocks"]}
    assert names == {f"blocks.{i}.{half}" for i in range(3) for half in ("first", "second")}
    assert found["kept_on"][SECOND] == [SECOND]
    assert all(found["peaks"][device] < found["plain_peaks"][device] for device in (FIRST, SECOND))


def test_a_block_that_computes_elsewhere_runs_again_as_a_whole(library: Path) -> None:
    """What it saves is not on the device whose budget its weights count for: the solver has no say in it."""
    found = seen(library, "strays")["min"]
    assert found["same"]
    rows = {row["name"]: row for row in found["summary"]["blocks"]}
    assert [rows[f"blocks.{i}"]["mode"] for i in range(4)] == ["replay", "replay", "fallback", "fallback"]
    assert rows["blocks.2"]["reason"] == f"computes on {FIRST}, its weights are on {SECOND}"


def test_every_second_block_is_counted_over_all_devices(library: Path) -> None:
    assert seen(library, "every_second") == ["blocks.0", "blocks.2", "blocks.4"]


def test_backwards_at_the_same_time_leave_generators_alone(library: Path) -> None:
    """Blocks that run again as a whole take turns at the generators, whichever thread they run in."""
    assert seen(library, "towers") == {"moved": 0, "modes": ["fallback"]}


def test_a_device_whose_blocks_are_never_called(library: Path) -> None:
    """It has no peak of its own; the other's plan and numbers are the model's."""
    found = seen(library, "one_never_called")
    assert found["planned"]
    assert found["offline"] == SECOND
    assert found["summary"]["measured_peak_bytes"] == by_device(found)[SECOND]["measured_peak_bytes"] > 0


def test_a_step_is_counted_once_wherever_it_trains(library: Path) -> None:
    first, second = seen(library, "counted")
    assert first == [second[0], True, scenarios.STEPS]
    assert second == [first[0], True, 2 * scenarios.STEPS]


def test_what_one_device_does_anew_the_other_measures_again(library: Path) -> None:
    """Blocks that are split after the first step: their activations on the other device are in its prediction."""
    found = seen(library, "crossing")["min"]
    assert found["same"]
    first = by_device(found)[FIRST]
    assert first["measured_peak_bytes"] == pytest.approx(first["predicted_peak_bytes"], rel=0.1)


def test_blocks_on_no_device_as_a_whole(library: Path) -> None:
    assert "No block of Chain has all its parameters on one device" in seen(library, "nowhere")


def test_a_device_that_cannot_be_measured_leaves_nothing_behind(library: Path) -> None:
    found = seen(library, "half_made")
    assert found["error"] == "no meter"
    assert found["hooks"][0] == found["hooks"][1]
    assert found["again"]


def test_an_allocators_error_is_explained_for_its_device(library: Path) -> None:
    assert seen(library, "memory_ran_out") == [False, True]


# What needs no device


def test_no_device_is_waited_for_until_the_backward_ends(library: Path) -> None:
    """Samples and hashes of what comes back are compared at the end of a backward, and the error is raised there."""
    found = seen(library, "canary")
    assert found["recomputed"] > 0
    assert found["steps"] == [["tolist", "tolist"]] * 4, "once for each device"
    assert any("The recomputed value is not what the forward saved" in error for error in found["errors"])
    assert found["errors"][-1] == ""
    assert found["same"]


def test_a_wrong_value_is_found_before_an_optimizer_steps_in_a_backward(library: Path) -> None:
    found = seen(library, "canary_before_optimizers")
    assert found["raised"]
    assert found["again"]
    assert not [name for name in found["moved"] if name.startswith(("blocks.0", "blocks.1", "blocks.2"))]


CUDA = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("budget", "bytes_of"),
    [
        ("2GiB", [2 * GIB, 2 * GIB]),
        ("cuda:0=2GiB,cuda:1=min", [2 * GIB, "min"]),
        (" CUDA:0 = 2GiB , 1 = none ", [2 * GIB, None]),
        ({0: GIB, 1: "2GiB"}, [GIB, 2 * GIB]),
        ({torch.device("cuda", 1): "min", "cuda:0": GIB}, [GIB, "min"]),
        (None, [None, None]),
    ],
)
def test_budgets_are_read(budget: Any, bytes_of: list[Any]) -> None:
    assert list(memory.resolve_budgets(budget, CUDA).values()) == bytes_of


def test_one_device_may_be_named_too() -> None:
    assert memory.resolve_budgets({"cpu": "2GiB"}, [torch.device("cpu")]) == {torch.device("cpu"): 2 * GIB}


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({}, "names no device"),
        ({0: "1GiB"}, "says nothing of `cuda:1`"),
        ({0: "1GiB", 1: "1GiB", 2: "1GiB"}, "names `2`, and the model's blocks are on `cuda:0`, `cuda:1`"),
        ({0: "1GiB", "cuda:0": "1GiB", 1: "1GiB"}, "names `cuda:0` twice"),
        ("0=1GiB,0=2GiB", "names `0` twice"),
        ("=1GiB", "leaves out a device"),
        ("cuda:0=1GiB,cuda:1", "is not a size"),
        ("cuda:0=much,cuda:1=1GiB", "Budget `much` is not a size"),
        ({0: {1: "1GiB"}, 1: "1GiB"}, "is not a size"),
    ],
)
def test_budgets_that_cannot_be_read(budget: Any, says: str) -> None:
    with pytest.raises(memfit.BudgetError) as caught:
        memory.resolve_budgets(budget, CUDA)
    assert says in str(caught.value)


def test_one_budget_stays_one() -> None:
    assert parse_budgets("6GiB") == Budget(kind="bytes", value=6 * GIB)


def test_what_crosses_devices() -> None:
    """A number on the CPU beside tensors of a device is none of its own."""
    there, other = torch.empty(2, device="meta"), torch.empty(2)
    number = torch.tensor(2.0)
    assert not ops.crosses_devices([there, number], {})
    assert not ops.crosses_devices([there], {"device": torch.device("meta")})
    assert not ops.crosses_devices([], {"device": "cpu"})
    assert ops.crosses_devices([there, other], {})
    assert ops.crosses_devices([there], {"device": "cpu"})
    assert ops.crosses_devices([other], {"device": torch.device("cuda", 1)})
