"""Batches of other lengths: one plan serves all that are smaller, what is larger is planned when it first comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import memfit
from faults import SMALLEST, WIDTH, Block, Stack, data
from gradients import assert_bitwise_equal, copies, seed
from memfit import host, planning
from memfit.keeper import Keeper
from memfit.occasions import MAX_WAIT, Occasions
from memfit.planned import Planned
from memfit.profiler import Profiler
from memfit.shapes import Shape
from memfit.solver import solve
from memfit.solver.working_set import kept_bytes
from policies import random_policy
from zoo import bert_model, gpt2_model, language, llama_model, masked_language, padded, without_cache

MIB = 2**20

Batches = list[Callable[[nn.Module], Tensor]]


class Counts:
    """How many steps were profiled, and how many plans were solved."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.profiled = self.planned = 0
        profiler, step_profile = Profiler.__init__, planning.step_profile

        def begin(profiler_: Profiler, *given: Any, **more: Any) -> None:
            self.profiled += 1
            profiler(profiler_, *given, **more)

        def solve(*given: Any, **more: Any) -> Any:
            self.planned += 1
            return step_profile(*given, **more)

        patch.setattr(Profiler, "__init__", begin)
        patch.setattr(planning, "step_profile", solve)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor | None]:
    """Of one step, with a fixed seed; then the weights move."""
    seed()
    model.zero_grad()
    loss(model).backward()
    found = copies((name, p.grad) for name, p in model.named_parameters())
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    return found


def trained(model: nn.Module, losses: Iterable[Callable[[nn.Module], Tensor]]) -> list[dict[str, Tensor | None]]:
    """Gradients of every step."""
    return [gradients(model, loss) for loss in losses]


def check(build: Callable[[], nn.Module], losses: Batches, **options: Any) -> memfit.Handle:
    """Train plain and fitted; all gradients have the same bits. Returns the handle, removed."""
    torch.manual_seed(0)
    expected = trained(without_cache(build()), losses)
    torch.manual_seed(0)
    model = without_cache(build())
    with memfit.fit(model, **options) as handle:
        for plain, fitted in zip(expected, trained(model, losses), strict=True):
            assert_bitwise_equal(fitted, plain)
    return handle


def of_length(length: int, i: int = 0, batch: int = 2) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(**language(i, batch=batch, length=length)).loss


def of_rows(rows: int, i: int = 0) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(data(i, rows=rows))


FITS = {**SMALLEST, "random": {"policy": random_policy(3)}, "selective": {"policy": "selective"}}


@pytest.mark.parametrize("options", list(FITS.values()), ids=list(FITS))
@pytest.mark.parametrize("build", [llama_model, gpt2_model], ids=["llama", "gpt2"])
def test_smaller_batches_follow_the_plan_of_the_larger(
    build: Callable[[], nn.Module], options: dict[str, Any], counts: Counts
) -> None:
    lengths = [24, 24, 24, 16, 20, 9, 16, 24, 23, 7]
    handle = check(build, [of_length(n, i) for i, n in enumerate(lengths)], **options)
    assert counts.profiled == 1
    assert {block["mode"] for block in handle.summary()["blocks"]} == {"replay"}
    assert handle.summary()["recomputed_bytes"] > 0
    assert all(block["saved_bytes"] is not None for block in handle.summary()["blocks"]), (
        "of a step that was not planned"
    )
    assert "6 steps were of other shapes, and followed the plan of a larger one" in handle.summary()["notes"]


def test_their_policies_keep_the_same_nodes() -> None:
    seen: list[tuple[int, ...]] = []

    def steps(model: nn.Module, handle: memfit.Handle) -> None:
        for i, length in enumerate([24, 24, 11, 24]):
            of_length(length, i)(model).backward()
            assert all(call.policy.program == call.program_key for call in handle.runtime.calls if call.policy)
            seen.append(tuple(len(call.policy.kept) for call in handle.runtime.calls if call.policy))

    model = llama_model()
    with memfit.fit(model, policy=random_policy(3)) as handle:
        steps(model, handle)
        kept = [call.policy.kept for call in handle.runtime.calls if call.policy]
        of_length(13, 9)(model).backward()
        assert [call.policy.kept for call in handle.runtime.calls if call.policy] == kept
    assert seen[1] == seen[2] == seen[3]


def test_ever_new_lengths_are_planned_once_and_nothing_is_demoted(counts: Counts) -> None:
    """More of them than `MAX_RECORDINGS_IN_A_ROW`, of a model that shares its recordings."""
    losses = [of_rows(n) for n in (64, *range(63, 20, -1))]
    handle = check(lambda: Stack(count=10), losses, budget="min")
    assert counts.profiled == 1
    assert {block["mode"] for block in handle.summary()["blocks"]} == {"replay"}
    assert handle.runtime.recorded <= 10 + 2 * len(losses), "then the first block, and one for all the others"


def test_masks_change_with_the_lengths(counts: Counts) -> None:
    losses: Batches = [
        lambda model, i=i, n=n: model(**padded(masked_language(i, length=n), 3 * i)).loss  # type: ignore[misc]
        for i, n in enumerate([24, 24, 20, 24, 17, 20, 13])
    ]
    check(bert_model, losses, budget="min")
    assert counts.profiled == 1


def test_a_larger_batch_is_profiled_when_it_comes(counts: Counts) -> None:
    """It runs under the smallest plan, and the next one has a plan already."""
    model = Stack()
    with memfit.fit(model, policy=random_policy(3)) as handle:
        for rows in [16, 16]:
            of_rows(rows)(model).backward()
        small = handle.plan
        of_rows(32)(model).backward()
        assert counts.profiled == 2
        of_rows(30)(model).backward()
        assert counts.profiled == 2
        assert handle.plan != small, "the report shows the largest"
        assert {call.program for call in handle.plan.calls} != {call.program_key for call in handle.runtime.calls}
        assert [call.policy.kept for call in handle.runtime.calls if call.policy] == [
            handle.plan.policy(i).kept for i in range(len(handle.plan.calls))
        ]
        of_rows(16)(model).backward()
        assert handle._planned.active is not None
        assert handle._planned.active.plan == small, "of two that fit, the one made for it"
        of_rows(15)(model).backward()
        assert handle._planned.active.plan == small, "of two that are large enough, the smaller"


def test_a_dimension_that_grows_is_not_covered(counts: Counts) -> None:
    """Fewer sequences, but longer: attention grows with the square."""
    losses = [of_length(12, 0, 4), of_length(12, 1, 4), of_length(24, 2, 2), of_length(24, 3, 2), of_length(12, 4, 2)]
    check(llama_model, losses, budget="min")
    assert counts.profiled == 2


class Switched(Block):
    """Other ops for short batches."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[0] > 10 else torch.sin(x))


def test_other_ops_are_no_smaller_batch(counts: Counts) -> None:
    """Where the length decides what runs, the policy of the long one is not used for the short one."""
    losses = [of_rows(n, i) for i, n in enumerate([16, 16, 8, 8, 8, 16, 7, 12])]
    handle = check(lambda: Stack(Switched), losses, policy=random_policy(5))
    assert counts.profiled == 2
    assert len(handle._planned) == 2


def test_two_kinds_of_steps_that_begin_alike_are_both_planned(counts: Counts) -> None:
    """One forward or two, in turns: a step's first block does not tell."""

    def twice(model: nn.Module) -> Tensor:
        return model(data(1, rows=16)) + model(data(2, rows=16))

    losses: Batches = [of_rows(16), twice] * 8
    handle = check(Stack, losses, budget="min")
    assert {len(sequence) for sequence, _ in handle._planned} == {3, 6}
    assert counts.profiled <= 4


def test_two_forwards_of_other_lengths() -> None:
    """Query and passage, each shorter or longer than before."""

    def pair(query: int, passage: int) -> Callable[[nn.Module], Tensor]:
        return lambda model: of_rows(query)(model) + of_rows(passage, 1)(model)

    losses = [pair(8, 32), pair(8, 32), pair(6, 32), pair(8, 20), pair(5, 9), pair(32, 8), pair(9, 31), pair(7, 30)]
    handle = check(Stack, losses, policy=random_policy(7))
    assert {block["mode"] for block in handle.summary()["blocks"]} == {"replay"}


def test_less_is_held_than_in_the_larger_step() -> None:
    """What frames hold when the forward is over."""
    held: dict[int, int] = {}
    model = Stack(count=4)
    with memfit.fit(model, policy=random_policy(11)) as handle:
        for i, rows in enumerate([64, 64, 64, 48, 48, 32]):
            loss = of_rows(rows, i)(model)
            held[rows] = sum(
                kept_bytes(handle._planning.profile(state), call.policy)
                for call in handle.runtime.calls
                if call.policy is not None and (state := handle.runtime.states[call.program_key])
            )
            loss.backward()
    assert held[32] < held[48] < held[64]


def middle(rows: int) -> tuple[nn.Module, int]:
    """A stack of some hundred MiB, and a budget that takes half of what it saves away."""
    torch.manual_seed(0)
    model = Stack(count=6)
    with memfit.fit(model, policy="plain") as handle:
        for i in range(2):
            of_rows(rows, i)(model).backward()
        profile = handle.profile
    assert profile is not None
    smallest = solve(profile, budget="min", model="", fingerprint="").predicted_peak_bytes
    plain = handle.plan.plain_peak_bytes
    assert plain - smallest > 60 * MIB
    return model, (plain + smallest) // 2 + 24 * MIB


@pytest.mark.skipif(not host.reset_highest_resident(), reason="this kernel does not reset VmHWM")
def test_a_smaller_step_gets_a_plan_of_its_own() -> None:
    """Once what it recomputes needlessly has cost as much as a plan does: then it recomputes less, or nothing."""
    rows = 4 * MIB // WIDTH
    model, budget = middle(rows)
    model.zero_grad()
    with memfit.fit(model, budget=budget) as handle:
        for i in range(3):
            of_rows(rows, i)(model).backward()
            model.zero_grad()
        assert handle.plan is not None
        assert handle.plan.recomputed_bytes > 0
        handle._planned.planning_seconds = 1e9
        of_rows(rows // 8, 3)(model).backward()
        of_rows(rows // 8, 4)(model).backward()
        assert len(handle._planned) == 1
        handle._planned.planning_seconds = 0.0
        for i in (5, 6):
            of_rows(rows // 8, i)(model).backward()
        active = handle._planned.active
        assert active is not None
        assert active.derived
        assert active.plan.recomputed_bytes == 0, "an eighth of it fits as it is"
        assert not handle._planned.covered
        assert handle.plan.recomputed_bytes > 0, "the report shows the larger"
        of_rows(rows, 7)(model).backward()
        assert handle._planned.active.plan == handle.plan


def test_only_profiled_plans_count_as_the_largest() -> None:
    """The larger ones may have been forgotten."""
    planned = Planned(Keeper())
    for number, (size, derived) in enumerate([(5, True), (3, False), (4, False)]):
        planned.add(((str(number), ""),), cast(Any, SimpleNamespace(size=size, derived=derived)))
    assert planned.largest is not None
    assert planned.largest.size == 4
    planned.drop((("1", ""),))
    planned.drop((("2", ""),))
    assert planned.largest is None


# What covers what -----------------------------------------------------------------------------------------------------


def test_covering_needs_the_form_and_every_size() -> None:
    shape = Shape("form", (8, 16), {0: (4, 2)})
    assert shape.covers(shape)
    assert shape.covers(replace(shape, sizes=(8, 15)))
    assert not shape.covers(replace(shape, sizes=(9, 1)))
    assert not shape.covers(replace(shape, form="other"))


@pytest.mark.parametrize(
    ("given", "taken"),
    [([(4, 2)], True), ([(3, 2)], True), ([(4, 3)], False), ([(4,)], False), ([], False), ([(1, 1), (9, 9)], True)],
)
def test_arguments_that_are_not_longer_are_likely_to_be_covered(given: list[tuple[int, ...]], taken: bool) -> None:
    assert Shape("form", (), {0: (4, 2)}).takes(given) is taken


# Which steps are profiled ---------------------------------------------------------------------------------------------


def test_steps_that_are_never_seen_again_are_profiled_less_and_less() -> None:
    occasions = Occasions()
    profiled = []
    for i in range(1000):
        if occasions.is_due(known=False):
            profiled.append(i)
            occasions.profiled()
    gaps = [b - a for a, b in pairwise(profiled)]
    assert gaps[:4] == [1, 2, 4, 8]
    assert max(gaps) == MAX_WAIT + 1


def test_a_plan_that_was_followed_makes_up_for_it() -> None:
    occasions = Occasions()
    for _ in range(5):
        occasions.profiled()
    occasions.followed()
    assert occasions.is_due(known=False)
    assert not occasions.is_due(known=True)
    occasions.surprised()
    assert occasions.is_due(known=True)
