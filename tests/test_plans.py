"""A plan file may come from anyone: it is a plan or a clear error."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit import plans
from memfit.errors import PlanError
from memfit.plans import CallPlan, Plan, Policy

PLAN = Plan(
    model="LlamaForCausalLM",
    fingerprint="9f3a",
    device="cpu",
    budget_bytes=6 * 2**30,
    predicted_peak_bytes=5 * 2**30,
    plain_peak_bytes=8 * 2**30,
    recompute_seconds=0.0123,
    saved_bytes=2**30,
    recomputed_bytes=3 * 2**30,
    peak_event="loss",
    policies=(Policy(program="a", kept=(0, 3), narrowed=(5,), returned=7), Policy(program="b", linked=0)),
    calls=(
        CallPlan(name="model.layers.0", program="a", policy=0),
        CallPlan(name="model.layers.1", program="b", policy=1),
    ),
    world_size=4,
    mesh=(2, 2),
)


def changed(*path, to) -> str:
    """The plan as JSON with one entry replaced."""
    data = json.loads(PLAN.to_json())
    entry = data
    for step in path[:-1]:
        entry = entry[step]
    entry[path[-1]] = to
    return json.dumps(data)


def test_a_plan_survives_json():
    assert Plan.from_json(PLAN.to_json()) == PLAN
    no_budget = replace(PLAN, budget_bytes=None, policies=(), calls=())
    assert Plan.from_json(no_budget.to_json()) == no_budget
    assert PLAN.policy(1) == Policy(program="b", linked=0)


def test_a_plan_survives_a_file(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        (["schema_version"], 2, "schema version 2; this Memfit reads version 3"),
        (["schema_version"], 4, "schema version 4; this Memfit reads version 3"),
        (["schema_version"], True, "schema version True"),
        (["schema_version"], 3.0, "`schema_version` is `3.0`"),
        (["schema_version"], "3", "schema version 3"),
        (["extra"], 1, "unknown field `extra`"),
        (["calls", 0, "kind"], 1, "calls[0] has the unknown field `kind`"),
        (["policies", 1, "code"], "", "policies[1] has the unknown field `code`"),
        (["model"], 5, "`model` is `5`"),
        (["model"], "x" * 5000, "`model`"),
        (["model"], "a\x1b[2J", "printable"),
        (["peak_event"], "\ud800", "printable"),
        (["budget_bytes"], -1, "`budget_bytes` is `-1`"),
        (["budget_bytes"], 1.5, "`budget_bytes` is `1.5`"),
        (["saved_bytes"], True, "`saved_bytes` is `true`"),
        (["saved_bytes"], 2**63, "`saved_bytes`"),
        (["recompute_seconds"], -0.1, "`recompute_seconds`"),
        (["recompute_seconds"], "1", "`recompute_seconds`"),
        (["recompute_seconds"], None, "`recompute_seconds` is `null`"),
        (["policies"], {}, "`policies` is `{}`; it must be a list"),
        (["policies", 0], [], "`policies[0]` is `[]`; it must be an object"),
        (["policies", 0, "kept"], [3, 0], "not ascending"),
        (["policies", 0, "kept"], [0, 0], "not ascending"),
        (["policies", 0, "kept"], [0, 5], "keeps node 5 both"),
        (["policies", 0, "returned"], "7", '`policies[0].returned` is `"7"`'),
        (["policies", 1, "linked"], -1, "`policies[1].linked` is `-1`"),
        (["policies", 1, "kept"], [0], "both keeps its linked input 0 and drops it"),
        (["policies", 1, "narrowed"], [0], "both keeps its linked input 0 and drops it"),
        (["policies", 0, "returned"], None, "`calls[1]` is linked to a call that brings nothing back"),
        (["policies", 0, "linked"], 1, "`calls[0]` is linked to a call that brings nothing back"),
        (["policies", 0, "kept"], [0, "3"], "`policies[0].kept[1]`"),
        (["policies", 0, "kept"], [-1], "`policies[0].kept[0]` is `-1`"),
        (["calls", 1, "policy"], 2, "`calls[1].policy` is `2`; it must be below 2"),
        (["calls", 1, "policy"], 0, "`calls[1].program`"),
        (["calls", 0, "name"], None, "`calls[0].name` is `null`"),
        (["world_size"], 0, "`world_size` is `0`; it must be at least 1"),
        (["world_size"], None, "`world_size` is `null`"),
        (["mesh"], 2, "`mesh` is `2`; it must be a list"),
        (["mesh"], [2, 0], "`mesh[1]` is `0`; it must be at least 1"),
    ],
)
def test_what_no_plan_says_is_refused(path, value, part):
    with pytest.raises(PlanError) as caught:
        Plan.from_json(changed(*path, to=value))
    assert part in str(caught.value)
    assert "`memfit plan`" in str(caught.value)


@pytest.mark.parametrize("field", json.loads(PLAN.to_json()))
def test_a_missing_field_is_named(field):
    data = json.loads(PLAN.to_json())
    del data[field]
    with pytest.raises(PlanError, match=f"lacks the field `{field}`"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not JSON"),
        ("plan", "not JSON"),
        ("[]", "must be an object"),
        ("null", "must be an object"),
        ('{"model": "a", "model": "b"}', "the field `model` twice"),
        ('{"model": NaN}', "contains `NaN`"),
        ('{"model": -Infinity}', "contains `-Infinity`"),
        ("[" * 100_000, "nested more than 6 levels"),
        ('{"a":' * 7 + "1" + "}" * 7, "nested more than 6 levels"),
        ('{"model": ' + "9" * 10_000 + "}", "not JSON that can be read"),
        (changed("model", to="[[[[[[[[[[").replace("9f3a", "\\\\\\"), "not JSON"),
    ],
)
def test_what_is_not_json_is_refused(text, part):
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert part in str(caught.value)


def test_brackets_in_names_are_no_nesting():
    named = replace(PLAN, model="[" * 50 + '"{\\')
    assert Plan.from_json(named.to_json()) == named


def test_numbers_that_overflow_are_refused():
    with pytest.raises(PlanError, match="`recompute_seconds`"):
        Plan.from_json(PLAN.to_json().replace("0.0123", "1e999"))


def test_limits_are_held(tmp_path, monkeypatch):
    text = PLAN.to_json()
    monkeypatch.setattr(plans, "MAX_ITEMS", 1)
    with pytest.raises(PlanError, match="2 items; at most 1"):
        Plan.from_json(text)
    monkeypatch.setattr(plans, "MAX_FILE_BYTES", len(text) - 1)
    with pytest.raises(PlanError, match=f"{len(text)} characters"):
        Plan.from_json(text)
    path = tmp_path / "plan.json"
    PLAN.save(path)
    with pytest.raises(PlanError, match=r"plan.json` has more than"):
        Plan.load(path)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(PlanError, match=r"missing.json`: No such file"):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="Is a directory"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match="Cannot write the plan"):
        PLAN.save(tmp_path / "no" / "plan.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match=r"bytes.json` is not JSON: byte 0"):
        Plan.load(tmp_path / "bytes.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(PlanError, match=r"In `.*other.json`: .*lacks the field"):
        Plan.load(tmp_path / "other.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(json.loads(PLAN.to_json()))), JSON)
def test_any_json_is_a_plan_or_a_plan_error(field, value):
    try:
        plan = Plan.from_json(changed(field, to=value))
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan
