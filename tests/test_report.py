"""The report: answer first, rows that add up, every number predicted or measured. Summaries here are made by hand."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.plans import CallPlan, Plan, Policy
from memfit.report.blocks import fold
from memfit.report.text import render, render_json, render_plan

GIB, MIB = 2**30, 2**20


def block(name, *, mode="replay", reason=None, saved=31 * MIB, recomputed=58 * MIB, parent=None):
    return {
        "name": name,
        "mode": mode,
        "reason": reason,
        "saved_bytes": saved,
        "recomputed_bytes": recomputed,
        "parent": parent,
    }


@pytest.fixture
def summary():
    return {
        "budget_bytes": int(6.5 * GIB),
        "predicted_peak_bytes": int(6.31 * GIB),
        "measured_peak_bytes": int(6.29 * GIB),
        "plain_peak_bytes": int(9.1 * GIB),
        "peak_event": "loss",
        "static_bytes": int(1.81 * GIB),
        "working_bytes": int(3.09 * GIB),
        "step_seconds": 0.142,
        "recompute_seconds": 0.0026,
        "saved_bytes": 1000 * MIB,
        "recomputed_bytes": 2000 * MIB,
        "steps": 120,
        "blocks": [block(f"model.layers.{i}") for i in range(12)],
    }


def test_report_in_full(summary):
    assert render(summary) == "\n".join(
        [
            "peak       6.29 GiB  of 6.50 GiB, measured (predicted 6.31), at the loss",
            "  static   1.81 GiB  parameters, gradients, optimizer state, predicted",
            "  saved    1.41 GiB  by 12 blocks, predicted",
            "  working  3.09 GiB  of that event, predicted",
            "  other    -0.02 GiB measured but not predicted",
            "plain      9.10 GiB  predicted peak if everything were saved",
            "step       142 ms    measured over 120 steps, 2.60 ms of it recomputation (+1.9%), predicted",
            "plan       save 33%, recompute 67% of the 2.93 GiB saved in blocks, predicted",
            "",
            "blocks             calls  mode       save  recompute  reason",
            "model.layers.0–11     12  replay  372 MiB    696 MiB",
        ]
    )


def test_before_the_first_planned_step(summary):
    summary |= {"measured_peak_bytes": None, "step_seconds": None, "steps": 1}
    lines = render(summary).splitlines()
    assert lines[0] == "peak       6.31 GiB  of 6.50 GiB, predicted, at the loss"
    assert not any(line.startswith("  other") for line in lines)
    assert "step       +2.60 ms  recomputation, predicted" in lines


def test_before_the_first_step():
    summary = {"budget_bytes": GIB, "predicted_peak_bytes": None, "measured_peak_bytes": None, "steps": 0, "blocks": []}
    assert render(summary) == "peak       not known: no training step has ended"


def test_without_a_budget(summary):
    summary["budget_bytes"] = None
    assert render(summary).splitlines()[0] == "peak       6.29 GiB  measured (predicted 6.31), at the loss"


def test_over_the_budget_is_said_with_its_bytes(summary):
    summary["measured_peak_bytes"] = int(6.6 * GIB)
    assert render(summary).splitlines()[0].endswith("at the loss; 102 MiB over the budget")


def test_units_of_the_other_numbers_are_kept_where_they_differ(summary):
    summary |= {"budget_bytes": 1 * GIB, "predicted_peak_bytes": 900 * MIB, "measured_peak_bytes": 910 * MIB}
    assert render(summary).splitlines()[0].startswith("peak       910 MiB   of 1.00 GiB, measured (predicted 900)")


@given(
    peak=st.integers(1, 2**45),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    error=st.floats(-0.05, 0.05),
)
def test_rows_add_up_as_shown(peak, shares, error):
    static = int(peak * shares[0])
    working = int((peak - static) * shares[1])
    measured = max(1, int(peak * (1 + error)))
    summary = {
        "predicted_peak_bytes": peak,
        "measured_peak_bytes": measured,
        "static_bytes": static,
        "working_bytes": working,
    }
    lines = render(summary).splitlines()
    shown = [float(re.split(r"\s+", line.strip())[1]) for line in lines if not line.startswith("plan")]
    assert shown[0] == pytest.approx(sum(shown[1:]), abs=1e-6 * max(1, shown[0]))


def test_notes_and_context_are_shown(summary):
    summary |= {"notes": ["`gradient_checkpointing_enable` was taken over."], "context_bytes": 500 * MIB}
    text = render(summary)
    assert "\nnote       `gradient_checkpointing_enable` was taken over.\n" in text
    assert "\ncontext    500 MiB   CUDA context, outside the budget\n" in text


def test_json_has_raw_numbers(summary):
    assert json.loads(render_json(summary)) == summary
    with pytest.raises(ValueError, match="JSON"):
        render_json({"step_seconds": float("nan")})


def test_blocks_that_differ_are_not_folded():
    rows = fold([block(f"h.{i}", saved=MIB * (2 if i in (3, 4) else 1)) for i in range(6)])
    assert [(row.name, row.num_calls, row.saved_bytes) for row in rows] == [
        ("h.0–2,5", 4, 4 * MIB),
        ("h.3–4", 2, 4 * MIB),
    ]


def test_several_calls_of_one_block_count():
    """Query and passage go through one encoder."""
    rows = fold([block(f"h.{i}") for i in range(3)] * 2)
    assert [(row.name, row.num_calls) for row in rows] == [("h.0–2", 6)]


def test_names_fold_only_where_every_combination_is_there():
    whole = [block(f"stage.{i}.block.{j}") for i in range(2) for j in range(3)]
    assert [row.name for row in fold(whole)] == ["stage.0–1.block.0–2"]
    rows = fold(whole[:-1])
    assert [(row.name, row.num_calls) for row in rows] == [("stage.0.block.0–2", 3), ("stage.1.block.0–1", 2)]


def test_digits_inside_a_word_are_part_of_the_name():
    rows = fold([block("layer1.0"), block("layer2.0")])
    assert [row.name for row in rows] == ["layer1.0", "layer2.0"]
    assert [row.name for row in fold([block("layer1"), block("layer1")])] == ["layer1"]


def test_children_are_indented_under_their_reason(summary):
    summary["blocks"] = [
        block("layers.0", mode="descent", reason="data-dependent shapes (`nonzero`)", saved=0, recomputed=0),
        block("layers.0.attn", parent="layers.0"),
    ]
    table = render(summary).split("\n\n")[1].splitlines()
    assert table[1].startswith("layers.0 ")
    assert table[1].endswith("data-dependent shapes (`nonzero`)")
    assert table[2].startswith("  layers.0.attn ")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_folding_loses_no_bytes_and_no_calls(calls):
    blocks = [block(f"a.{i}.b.{j}", saved=size, recomputed=2 * size) for i, j, size in calls]
    rows = fold(blocks)
    assert sum(row.num_calls for row in rows) == len(blocks)
    assert sum(row.saved_bytes for row in rows) == sum(entry["saved_bytes"] for entry in blocks)
    assert sum(row.recomputed_bytes for row in rows) == sum(entry["recomputed_bytes"] for entry in blocks)


def test_a_plan_is_all_predicted():
    plan = Plan(
        model="Llama",
        fingerprint="f",
        device="cpu",
        budget_bytes=2 * GIB,
        predicted_peak_bytes=int(1.9 * GIB),
        plain_peak_bytes=3 * GIB,
        recompute_seconds=0.25,
        saved_bytes=GIB,
        recomputed_bytes=GIB,
        peak_event="loss",
        policies=(Policy(program="p"),),
        calls=(CallPlan(name="h.0", program="p", policy=0), CallPlan(name="h.1", program="p", policy=0)),
    )
    assert render_plan(plan).splitlines() == [
        "peak       1.90 GiB  of 2.00 GiB, predicted, at the loss",
        "plain      3.00 GiB  predicted peak if everything were saved",
        "step       +250 ms   recomputation, predicted",
        "plan       save 50%, recompute 50% of the 2.00 GiB saved in blocks, predicted",
        "blocks     2         block calls, 1 policy",
    ]


def test_what_was_not_measured_is_left_empty():
    summary = {
        "budget_bytes": None,
        "predicted_peak_bytes": None,
        "measured_peak_bytes": GIB,
        "plain_peak_bytes": GIB,
        "blocks": [
            block(f"h.{i}", mode="plain", reason="no budget", saved=None, recomputed=0, parent="") for i in (0, 1)
        ],
    }
    assert render(summary).splitlines() == [
        "peak       1.00 GiB  measured",
        "",
        "blocks  calls  mode   save  recompute  reason",
        "h.0–1       2  plain              0 B  no budget",
    ]


def test_a_budget_in_words_is_shown(summary):
    summary |= {"budget": "min", "budget_bytes": None}
    assert render(summary).splitlines()[0].endswith("at the loss; budget `min`")


def test_compute_and_rate(summary):
    summary.update(model_flops=44_800_000_000_000, hardware_flops=59_123_000_000_000)
    lines = render(summary).splitlines()
    assert "compute    44.8 TFLOP forward and backward of a step, 59.1 TFLOP with recomputation, counted" in lines
    assert not any(line.startswith("rate") for line in lines)
    summary.update(tflops_per_second=387.04, model_flop_utilization=None, hardware_flop_utilization=None)
    assert "rate       387 TFLOP/s measured" in render(summary).splitlines()
    summary.update(model_flop_utilization=0.3914, hardware_flop_utilization=0.5166)
    line = "rate       387 TFLOP/s measured, 39.1% of what the device can (MFU), 51.7% with recomputation (HFU)"
    assert line in render(summary).splitlines()
    summary.update(hardware_flops=None, hardware_flop_utilization=None)
    lines = render(summary).splitlines()
    assert "compute    44.8 TFLOP forward and backward of a step, counted" in lines
    assert "rate       387 TFLOP/s measured, 39.1% of what the device can (MFU)" in lines
