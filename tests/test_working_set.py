"""The walked working set is what the runtime would hold: by hand, and against lifetimes looked up one by one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from memfit.errors import PlanError
from memfit.plans import Policy
from memfit.profiles import Node, OpCost, ProgramProfile, TimelineEvent
from memfit.solver.special import full_policy, is_costly, plain_policy, selective_policy
from memfit.solver.working_set import kept_bytes, recipe_ops, working_set
from programs import all_policies, program, random_program


def op(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], **options) -> OpCost:
    return OpCost(name=name, seconds=options.pop("seconds", 1.0), inputs=inputs, outputs=outputs, **options)


def node(size: int, **options) -> Node:
    return Node(storage_bytes=size, keep_bytes=size, **options)


def event(kind: str, number: int) -> TimelineEvent:
    return TimelineEvent(kind=kind, **{"size" if kind in ("alloc", "free") else "index": number})


def policy(*kept: int, narrowed: tuple[int, ...] = ()) -> Policy:
    return Policy(program="p", kept=kept, narrowed=narrowed)


def three_in_a_row() -> ProgramProfile:
    """x -> a -> b -> c, all of them saved, unpacked and released in reverse."""
    nodes = [node(10, kind="input", num_saved=1), node(20, num_saved=1), node(30, num_saved=1), node(40, num_saved=1)]
    ops = [op("f", (0,), (1,)), op("g", (1,), (2,)), op("h", (2,), (3,))]
    return program(nodes, ops)


def test_saving_everything_starts_at_the_peak():
    found = working_set(three_in_a_row(), policy(0, 1, 2, 3))
    assert (found.kept_bytes, found.peak_bytes, found.recompute_seconds, found.recomputed_ops) == (100, 100, 0.0, ())


def test_the_first_unpack_pulls_the_whole_chain():
    found = working_set(three_in_a_row(), policy(0))
    assert (found.kept_bytes, found.peak_bytes, found.recompute_seconds, found.recomputed_ops) == (
        10,
        100,
        3.0,
        (0, 1, 2),
    )


def test_a_value_that_comes_back_late_costs_less():
    """b is recomputed from a when c, kept, has been released: 10 + 20 + 30 < 10 + 20 + 40."""
    found = working_set(three_in_a_row(), policy(0, 1, 3))
    assert (found.kept_bytes, found.peak_bytes, found.recomputed_ops) == (70, 70, (1,))
    late = replace(three_in_a_row(), timeline=three_in_a_row().timeline[:3])
    assert working_set(late, policy(0, 1, 3)).peak_bytes == 70
    early = replace(three_in_a_row(), timeline=tuple(event("unpack", index) for index in (3, 2, 1, 0)))
    assert working_set(early, policy(0, 1, 3)).peak_bytes == 100


def test_unsaved_values_go_at_their_last_use():
    """x -> u -> v -> s: x is gone when v is made, u when s is made."""
    nodes = [node(10, kind="input"), node(100), node(50), node(30, num_saved=1)]
    profile = program(nodes, [op("f", (0,), (1,)), op("g", (1,), (2,)), op("h", (2,), (3,))])
    assert working_set(profile, policy(0)).peak_bytes == 100 + 50


def test_an_input_goes_at_its_last_use():
    nodes = [node(100, kind="input"), node(10, num_saved=1), node(5, num_saved=1)]
    timeline = (
        event("unpack", 0), event("release", 0), event("alloc", 60), event("unpack", 1), event("release", 1)
    )  # fmt: skip
    profile = program(nodes, [op("f", (0,), (1,)), op("g", (0,), (2,))], timeline=timeline)
    assert working_set(profile, policy(0)).peak_bytes == 100 + 60 + 5
    assert working_set(profile, policy(0, 2)).peak_bytes == 5 + 100 + 10


def test_narrow_bytes_are_held_and_full_bytes_from_the_first_use():
    nodes = [replace(node(40, num_saved=1), narrow_bytes=10, narrow_seconds=0.5), node(8, num_saved=1)]
    timeline = (event("unpack", 1), event("alloc", 3), event("unpack", 0), event("release", 0), event("release", 1))
    profile = program([replace(nodes[0]), nodes[1]], [op("f", (), (0,)), op("g", (0,), (1,))], timeline=timeline)
    both = working_set(profile, policy(1, narrowed=(0,)))
    assert (both.kept_bytes, both.peak_bytes, both.recompute_seconds) == (18, 8 + 10 + 3 + 40, 0.5)
    read = working_set(profile, policy(narrowed=(0,)))  # the recipe of 1 reads 0, and it stays wide
    assert (read.kept_bytes, read.peak_bytes, read.recompute_seconds) == (10, 10 + 40 + 8 + 3, 1.5)


def test_an_op_with_two_outputs_runs_once():
    nodes = [node(1, kind="input"), node(4, num_saved=1), node(8, num_saved=1)]
    profile = program(nodes, [op("f", (0,), (1, 2))])
    found = working_set(profile, policy(0))
    assert (found.recompute_seconds, found.peak_bytes) == (1.0, 13)
    assert working_set(profile, policy(0, 1)).peak_bytes == 1 + 4 + 4 + 8  # a second copy of 1, for a moment


def test_gradients_that_stay_are_counted():
    nodes = [node(1, kind="input"), node(4, num_saved=1)]
    timeline = (event("alloc", 50), event("free", 20), event("unpack", 0), event("alloc", 7))
    profile = program(nodes, [op("f", (0,), (1,))], timeline=timeline)
    assert working_set(profile, policy(1)).peak_bytes == 4 + 50
    assert working_set(replace(profile, timeline=(*timeline, event("alloc", 20))), policy(1)).peak_bytes == 4 + 57


def test_tensors_that_autograd_never_asks_for_go_when_released():
    profile = three_in_a_row()
    profile = replace(profile, timeline=(event("release", 3), event("alloc", 30)))
    assert working_set(profile, policy(0, 1, 2, 3)).peak_bytes == 100


@pytest.mark.parametrize("kept", [(), (1, 2), (0, 2)])
def test_a_policy_that_cannot_bring_everything_back_is_refused(kept):
    nodes = [node(1, kind="input"), node(4, num_saved=1), node(8, num_saved=1)]
    profile = program(nodes, [op("f", (0,), (1,), recomputable=False), op("g", (0,), (2,))])
    if kept == (1, 2):
        assert recipe_ops(profile, policy(*kept)) == ()
        return
    with pytest.raises(PlanError, match="no recipe brings back"):
        working_set(profile, policy(*kept))


def test_a_policy_that_keeps_what_cannot_be_kept_is_refused():
    nodes = [node(1, kind="input"), Node(storage_bytes=4), node(8, num_saved=1)]
    profile = program(nodes, [op("f", (0,), (1,)), op("g", (1,), (2,))])
    with pytest.raises(PlanError, match="keeps node 1"):
        working_set(profile, policy(1))
    with pytest.raises(PlanError, match="keeps node 2"):
        working_set(profile, policy(narrowed=(2,)))


def obvious_peak(profile: ProgramProfile, made: Policy) -> int:
    """The peak from lifetimes: list every moment, then ask of every node whether it is there at that moment."""
    recipes = set(recipe_ops(profile, made))
    present = set(made.kept) | set(made.narrowed)
    moments: list[tuple[str, int]] = []
    start: dict[int, int] = {}  # node -> moment of its recomputation or widening
    ran: set[int] = set()

    def widen(index: int) -> None:
        if index in made.narrowed and index not in start:
            moments.append(("widen", index))
            start[index] = len(moments) - 1

    def make(index: int) -> None:
        producer = profile.nodes[index].producer
        if index in present or producer is None or producer in ran:
            return
        order = []
        stack = [producer]
        while stack:
            number = stack.pop()
            if number in ran or number in order:
                continue
            order.append(number)
            for source in profile.ops[number].inputs:
                if source not in present and profile.nodes[source].producer is not None:
                    stack.append(profile.nodes[source].producer)
        for number in sorted(order):
            for source in profile.ops[number].inputs:
                widen(source)
            moments.append(("run", number))
            ran.add(number)
            for output in profile.ops[number].outputs:
                start.setdefault(output, len(moments) - 1)

    for each in profile.timeline:
        if each.kind == "unpack":
            make(profile.saved[each.index])
            widen(profile.saved[each.index])
        moments.append((each.kind, each.size if each.kind in ("alloc", "free") else each.index))

    def last_read(index: int) -> float:
        reads = [t for t, (kind, what) in enumerate(moments) if kind == "run" and index in profile.ops[what].inputs]
        waiting = any(index in profile.ops[number].inputs for number in recipes - ran)
        return float("inf") if waiting else max(reads, default=-1)

    def end(index: int, *, released: bool) -> float:
        """Last moment at which a node is wanted: for a frame up to the releases, for a cache to what was unpacked."""
        last = last_read(index)
        for number, saved in enumerate(profile.saved):
            if saved == index:
                gone = moments.index(("release", number)) if ("release", number) in moments else float("inf")
                asked = moments.index(("unpack", number)) if ("unpack", number) in moments else float("inf")
                last = max(last, gone - 0.5 if released or asked < gone else min(asked, gone) - 0.5)
        return last

    peaks = [kept_bytes(profile, made)]
    transient = 0
    for now, (kind, what) in enumerate(moments):
        transient += what if kind == "alloc" else -what if kind == "free" else 0
        total = transient
        for index in made.kept:
            total += profile.nodes[index].keep_bytes if now <= end(index, released=True) else 0
        for index in made.narrowed:
            total += profile.nodes[index].narrow_bytes if now <= end(index, released=True) else 0
        for index, since in start.items():
            there = since <= now <= end(index, released=False) and index not in made.kept
            made_now = kind == "run" and index in profile.ops[what].outputs
            total += profile.nodes[index].storage_bytes if there or made_now else 0
        peaks.append(total)
    return max(peaks)


@pytest.mark.parametrize("seed", range(40))
def test_the_walk_equals_lifetimes_looked_up_one_by_one(seed):
    profile = random_program(seed, num_ops=5)
    rng = random.Random(seed)
    events = list(profile.timeline)
    for _ in range(3):  # releases that come late, tensors nobody asks for
        late = rng.randrange(len(events)) if events else 0
        if events and events[late].kind == "release":
            events.append(events.pop(late))
        elif events and rng.random() < 0.3:
            events.pop(late)
    profile = replace(profile, timeline=tuple(events))
    checked = 0
    made = all_policies(profile)
    for each in rng.sample(made, min(len(made), 150)):
        try:
            found = working_set(profile, each)
        except PlanError:
            continue
        checked += 1
        assert found.peak_bytes == obvious_peak(profile, each), each
    assert checked


def test_special_policies():
    nodes = [
        node(8, kind="input"),
        node(16, kind="parameter", num_saved=1),
        node(8, num_saved=1),  # norm
        node(8, num_saved=1),  # matmul
        node(8, num_saved=1),  # gelu
        node(8, num_saved=1, must_keep=True),  # boundary
        replace(node(8, num_saved=1), keep_bytes=0),  # held by something else
        node(8, num_saved=1),  # reads the boundary's second, unsaved output: no recipe
        Node(storage_bytes=8),
        node(8, kind="input"),  # read by no recipe
        node(8),
    ]
    ops = [
        op("aten.native_layer_norm.default", (0,), (2,)),
        op("aten.addmm.default", (2, 1), (3,)),
        op("aten.gelu.default", (3,), (4,)),
        op("custom.boundary", (4,), (5, 8), recomputable=False),
        op("aten.add.Tensor", (4,), (6,)),
        op("aten.neg.default", (8,), (7,)),
        op("aten.add.Tensor", (7, 9), (10,)),
    ]
    profile = program(nodes, ops)
    assert plain_policy(profile).kept == (2, 3, 4, 5, 6, 7)
    assert full_policy(profile).kept == (0, 5, 6, 7)
    assert selective_policy(profile).kept == (0, 3, 5, 6, 7)
    for made in (plain_policy, full_policy, selective_policy):
        working_set(profile, made(profile))
    assert working_set(profile, full_policy(profile)).recomputed_ops == (0, 1, 2)


def test_a_value_that_can_be_neither_kept_nor_recomputed_is_refused():
    profile = program(
        [node(8, kind="input"), Node(storage_bytes=4, num_saved=1)], [op("f", (0,), (1,), recomputable=False)]
    )
    with pytest.raises(PlanError, match="neither kept nor recomputed"):
        full_policy(profile)


def test_costly_ops():
    costly = "aten.mm.default aten.addmm.default aten._scaled_dot_product_flash_attention_for_cpu.default".split()
    assert all(is_costly(name) for name in [*costly, "aten.convolution.default", "mm"])
    assert not any(is_costly(name) for name in ["aten.mul.Tensor", "aten.gelu.default", "custom.mm_like"])
