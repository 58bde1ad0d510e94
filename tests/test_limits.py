"""When freed memory goes back, and how much of a budget stays free: both from numbers alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from memfit import host
from memfit import limits as module
from memfit.fitted import Fitted
from memfit.limits import Keeper, Limits, limits
from memfit.memory import Meter
from memfit.plans import Policy
from memfit.profiles import Node, OpCost, ProgramProfile
from memfit.slack import FLOOR, MAX_CORRECTIONS, ROOM_SHARE, SETTLED_STEPS, Slack
from memfit.solver.peak import simulate_policies
from programs import chain_step, program, release_at_once


def block(key: str, size: int, *, forward_bytes: int) -> ProgramProfile:
    """An input and one saved value of ``size`` bytes; its backward needs 7 bytes beside them."""
    nodes = [
        Node(storage_bytes=4, kind="input", keep_bytes=4),
        Node(storage_bytes=size, num_saved=1, keep_bytes=size),
    ]
    ops = [OpCost(name="f", seconds=2.0, inputs=(0,), outputs=(1,))]
    return program(nodes, ops, key=key, timeline=release_at_once((1,), {0: 7}), forward_bytes=forward_bytes)


STEP = chain_step([block("a", 100, forward_bytes=120), block("b", 50, forward_bytes=300)], outside=1000, loss=200)
POLICIES = [Policy(program="a", kept=(1,)), Policy(program="b", kept=(0,))]
SIMULATION = simulate_policies(STEP, POLICIES)


@pytest.fixture(autouse=True)
def no_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed memory serves whoever comes next."""
    monkeypatch.setattr(module, "SCATTER", 1.0)


def test_memory_grows_by_what_comes_next():
    # held at the start: 1000; after the first forward 1100, after the second 1104; before their backwards the same
    found = limits(STEP, POLICIES, [0, 1], 1400)
    assert found == Limits(1400, 120, {0: 300, 1: 200}, {1: 50 + 7, 0: 7})


def test_every_event_fits_where_its_growth_fits():
    """Whatever is held at a moment, and grows by what it says, stays at the peak or below."""
    found = limits(STEP, POLICIES, [0, 1], SIMULATION.peak_bytes)
    held = {0: 1100, 1: 1104}
    assert found.start is not None
    reached = [1000 + found.start, *(held[i] + g for moment in (found.after, found.before) for i, g in moment.items())]
    assert max(reached) == SIMULATION.peak_bytes


def test_calls_go_by_their_place_in_the_step():
    found = limits(STEP, POLICIES, [3, 8], 1400)
    assert set(found.after) == set(found.before) == {3, 8}


def test_far_from_the_budget_nothing_is_handed_back():
    assert limits(STEP, POLICIES, [0, 1], 2000) == Limits()
    assert limits(replace(STEP, events=()), POLICIES, [0, 1], 0) == Limits()


class Process:
    """A meter of a process that holds ``used`` bytes, and ``free`` more that nobody uses."""

    device = torch.device("cpu")

    def __init__(self, used: int, free: int) -> None:
        self.used, self.free, self.eager = used, free, False

    def now(self) -> int:
        return self.used + self.free

    def release(self) -> None:
        self.free = 0

    def release_eagerly(self, *, on: bool) -> bool:
        self.eager = on
        return True


@pytest.mark.parametrize(
    ("used", "free", "left", "eager"),
    [
        (700, 100, 100, False),
        (700, 260, 0, False),
        (880, 80, 0, False),
        (920, 10, 0, True),
    ],
)
def test_freed_memory_goes_back_where_the_next_event_would_not_fit(
    used: int, free: int, left: int, eager: bool, monkeypatch: pytest.MonkeyPatch
):
    process = Process(used, free)
    monkeypatch.setattr(host, "release_eagerly", process.release_eagerly)
    keeper = Keeper(cast(Meter, process))
    keeper.begin(Limits(1000, 0, {3: 100}, {}))
    keeper.left(2)
    assert process.free == free
    keeper.left(3)
    assert (process.free, process.eager) == (left, eager)
    keeper.begin(Limits())
    assert not process.eager


def test_on_cuda_nothing_is_handed_back():
    process = Process(900, 900)
    process.device = torch.device("cuda:0")
    Keeper(cast(Meter, process)).begin(Limits(1000, 500))
    assert process.free == 900


def fitted(raw_peak: int, *, recompute_seconds: float = 1.0) -> Fitted:
    plan = SimpleNamespace(recompute_seconds=recompute_seconds)
    return cast(Fitted, SimpleNamespace(raw_peak=raw_peak, peak=0, steps=0, stale=False, plan=plan))


def test_slack_is_a_share_until_it_is_learnt():
    slack = Slack("cuda")
    slack.expect(1000 * FLOOR)
    assert slack.bytes == 50 * FLOOR + FLOOR
    made: Any = fitted(100 * FLOOR)
    slack.learn(made, peak_bytes=160 * FLOOR, budget=150 * FLOOR)
    assert made.stale
    assert slack.bytes == 60 * FLOOR + FLOOR
    slack.expect(1000 * FLOOR)
    assert slack.bytes == 60 * FLOOR + FLOOR


def test_a_plan_that_wastes_its_budget_is_made_again_once_it_has_settled():
    slack, budget = Slack("cpu"), 1000 * FLOOR
    made: Any = fitted(900 * FLOOR)
    peak = int(budget * (1 - 2 * ROOM_SHARE))
    for step in range(SETTLED_STEPS):
        assert not made.stale, step
        slack.learn(made, peak_bytes=peak, budget=budget)
    assert made.stale
    assert slack.bytes == peak - 900 * FLOOR + budget // 50


def test_a_plan_that_recomputes_nothing_wastes_nothing():
    slack = Slack("cpu")
    made: Any = fitted(100, recompute_seconds=0.0)
    for _ in range(SETTLED_STEPS + 1):
        slack.learn(made, peak_bytes=100, budget=10_000 * FLOOR)
    assert not made.stale


def test_corrections_end():
    slack = Slack("cpu")
    for attempt in range(MAX_CORRECTIONS + 2):
        made: Any = fitted(100)
        slack.learn(made, peak_bytes=300, budget=200)
        assert made.stale == (attempt < MAX_CORRECTIONS)


def test_rules_of_geometry_decide_where_torch_has_no_guards(monkeypatch):
    """Without torch's own check of many tensors a changed geometry is found all the same."""
    import memfit
    from memfit import checks

    monkeypatch.setattr(checks, "_guards", lambda tensors: checks._Never())

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(self.linear(x)).exp()

    model = torch.nn.Sequential(*[Block() for _ in range(3)])
    with memfit.fit(model, policy="full", optimizer="sgd") as handle:
        for size in (4, 4, 4, 6, 6):
            model(torch.rand(size, 8)).sum().backward()
        assert not [note for note in handle.summary()["notes"] if "recorded again" in note]
        assert all(row["mode"] == "replay" for row in handle.summary()["blocks"])
