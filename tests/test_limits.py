"""By how much memory grows between moments, and how much of a budget stays free: both from numbers alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from memfit.fitted import Fitted
from memfit.limits import START, Limits, limits
from memfit.plans import Policy
from memfit.profiles import Node, OpCost, ProgramProfile
from memfit.slack import CHURN_SHARE, FAULT_SECONDS, FLOOR, MAX_CORRECTIONS, ROOM_SHARE, SETTLED_STEPS, Slack
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


def test_memory_grows_by_what_comes_next():
    # held at the start: 1000; after the first forward 1100, after the second 1104; before their backwards the same
    found = limits(STEP, SIMULATION, [0, 1], 1400)
    growths = {START: 120, ("after", 0): 300, ("after", 1): 200, ("before", 1): 53, ("before", 0): 7}
    assert found == Limits(1400, growths)


def test_every_event_fits_where_its_growth_fits():
    """Whatever is held at a moment, and grows by what it says, stays at the peak or below."""
    growths = limits(STEP, SIMULATION, [0, 1], SIMULATION.peak_bytes).growths
    held = {START: 1000, ("after", 0): 1100, ("after", 1): 1104, ("before", 1): 1104, ("before", 0): 1100}
    assert max(held[moment] + growth for moment, growth in growths.items()) == SIMULATION.peak_bytes


def test_calls_go_by_their_place_in_the_step():
    found = limits(STEP, SIMULATION, [3, 8], 1400)
    assert {index for kind, index in found.growths if kind != "start"} == {3, 8}


def test_far_from_the_budget_nothing_is_minded():
    assert limits(STEP, SIMULATION, [0, 1], 2400) == Limits(2400)
    assert limits(replace(STEP, events=()), SIMULATION, [0, 1], 0) == Limits()


def fitted(raw_peak: int, *, recompute_seconds: float = 1.0) -> Fitted:
    plan = SimpleNamespace(recompute_seconds=recompute_seconds)
    return cast(Fitted, SimpleNamespace(raw_peak=raw_peak, peak=0, steps=0, stale=False, plan=plan))


def test_slack_is_a_share_until_it_is_learnt():
    slack = Slack("cuda")
    slack.expect(1000 * FLOOR)
    assert slack.bytes == 50 * FLOOR + FLOOR
    made: Any = fitted(100 * FLOOR)
    slack.learn(made, peak_bytes=161 * FLOOR, budget=150 * FLOOR)
    assert made.stale
    assert slack.bytes == 51 * FLOOR + (61 - 51) * FLOOR // 2
    slack.expect(1000 * FLOOR)
    assert slack.bytes == 56 * FLOOR


def test_a_plan_that_wastes_its_budget_is_made_again_once_it_has_settled():
    slack, budget = Slack("cpu"), 1000 * FLOOR
    made: Any = fitted(900 * FLOOR)
    peak = int(budget * (1 - 2 * ROOM_SHARE))
    for step in range(SETTLED_STEPS):
        assert not made.stale, step
        slack.learn(made, peak_bytes=peak, budget=budget)
    assert made.stale
    assert slack.bytes == peak - 900 * FLOOR + budget // 50


def test_a_limited_heap_can_do_with_less_for_page_faults():
    slack = Slack("cuda")
    slack.expect(1000 * FLOOR, budget=500 * FLOOR, base_bytes=100 * FLOOR)
    assert slack.least == slack.bytes == 51 * FLOOR
    slack.expect(1000 * FLOOR, budget=500 * FLOOR, base_bytes=100 * FLOOR, limited=True)
    assert (slack.bytes, slack.least) == (21 * FLOOR, 6 * FLOOR)
    assert slack.least_seconds == pytest.approx(CHURN_SHARE * FAULT_SECONDS * 400 * FLOOR)


def test_the_smallest_plan_wastes_nothing():
    slack = Slack("cpu")
    made: Any = fitted(100 * FLOOR)
    for _ in range(SETTLED_STEPS):
        slack.learn(made, peak_bytes=100 * FLOOR, budget=200 * FLOOR, smallest=True)
    assert not made.stale
    slack.learn(made, peak_bytes=201 * FLOOR, budget=200 * FLOOR, smallest=True)
    assert made.stale


def test_of_what_a_plan_needs_less_than_predicted_half_is_believed():
    slack, budget = Slack("cpu"), 1000 * FLOOR
    made: Any = fitted(960 * FLOOR)
    for _ in range(SETTLED_STEPS):
        slack.learn(made, peak_bytes=900 * FLOOR, budget=budget)
    assert made.stale
    assert slack.bytes == -30 * FLOOR + budget // 50


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
