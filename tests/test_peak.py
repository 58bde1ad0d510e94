"""Peak memory has one definition; here it is, summed by hand."""

from __future__ import annotations

import pytest

from memfit.errors import PlanError
from memfit.plans import CallPlan, Plan, Policy
from memfit.profiles import Node, OpCost, StepEvent
from memfit.solver.peak import event_bytes, simulate, simulate_policies
from programs import chain_step, program, release_at_once


def block(key: str, size: int, *, forward_bytes: int):
    """An input and one saved value of ``size`` bytes; its backward needs 7 bytes beside them."""
    nodes = [
        Node(storage_bytes=4, kind="input", keep_bytes=4),
        Node(storage_bytes=size, num_saved=1, keep_bytes=size),
    ]
    ops = [OpCost(name="f", seconds=2.0, inputs=(0,), outputs=(1,))]
    return program(nodes, ops, key=key, timeline=release_at_once((1,), {0: 7}), forward_bytes=forward_bytes)


STEP = chain_step([block("a", 100, forward_bytes=120), block("b", 50, forward_bytes=300)], outside=1000, loss=200)


def plan(*policies: Policy) -> Plan:
    return Plan(
        model="M",
        fingerprint="f",
        device="cpu",
        budget_bytes=None,
        predicted_peak_bytes=0,
        plain_peak_bytes=0,
        recompute_seconds=0.0,
        saved_bytes=0,
        recomputed_bytes=0,
        peak_event="",
        policies=policies,
        calls=tuple(
            CallPlan(name=f"layers.{number}", program=policy.program, policy=number)
            for number, policy in enumerate(policies)
        ),
    )


def test_events_are_summed_by_the_definition():
    found = simulate(STEP, plan(Policy(program="a", kept=(1,)), Policy(program="b", kept=(0,))))
    assert found.events == (
        ("forward of layers.0", 1000 + 120),
        ("forward of layers.1", 1000 + 100 + 300),
        ("loss", 1200 + 100 + 4),
        ("backward of layers.1", 1000 + 100 + 50 + 7),  # the input goes when its last reader has run
        ("backward of layers.0", 1000 + 100 + 7),
        ("optimizer", 1000),
    )
    assert (found.peak_bytes, found.event) == (1400, "forward of layers.1")
    assert found.recompute_seconds == 2.0
    assert found.kept_bytes == (100, 4)


def test_the_first_of_equal_peaks_owns_it():
    events = tuple(StepEvent(name=name, kind="outside", outside_bytes=5) for name in ("clip", "optimizer"))
    found = simulate_policies(type(STEP)(device="cpu", programs={}, calls=(), events=events), [])
    assert (found.peak_bytes, found.event) == (5, "clip")


def test_one_event():
    backward = StepEvent(name="x", kind="backward", call=1, live_calls=(0,), outside_bytes=10)
    assert event_bytes(STEP, backward, [1, 2], [100, 200]) == 10 + 1 + 200
    outside = StepEvent(name="x", kind="outside", call=1, live_calls=(0,), outside_bytes=10)
    assert event_bytes(STEP, outside, [1, 2], [100, 200]) == 10 + 1
    forward = StepEvent(name="x", kind="forward", call=1, live_calls=(0,), outside_bytes=10)
    assert event_bytes(STEP, forward, [1, 2], [100, 200]) == 10 + 1 + 300


def test_a_plan_for_another_step_is_refused():
    with pytest.raises(PlanError, match="1 block calls and the step has 2"):
        simulate(STEP, plan(Policy(program="a", kept=(1,))))
    with pytest.raises(PlanError, match=r"`b` of `layers.0`, which runs `a`"):
        simulate(STEP, plan(Policy(program="b", kept=(1,)), Policy(program="b", kept=(1,))))
