"""The options of a block equal those of a slow enumeration of all its policies."""

from __future__ import annotations

import random
from itertools import pairwise, product

import pytest

from memfit.errors import PlanError
from memfit.plans import Policy
from memfit.profiles import Node, OpCost, ProgramProfile
from memfit.solver.choices import TICKS, Choices
from memfit.solver.cuts import cheapest_closure
from memfit.solver.frontier import Option, between, block_options, hull_points, option, prune, special_policies
from memfit.solver.special import full_policy, plain_policy
from memfit.solver.working_set import WorkingSet, working_set
from programs import all_policies, llama_block, program, random_program

SEEDS = range(40)


def every_policy(profile: ProgramProfile) -> dict[Policy, WorkingSet]:
    """All policies that can be run, walked."""
    found = {}
    for policy in all_policies(profile):
        try:
            found[policy] = working_set(profile, policy)
        except PlanError:
            continue
    return found


def ticks(seconds: float) -> int:
    return round(seconds * TICKS)


def below(numbers: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return numbers != others and all(a <= b for a, b in zip(numbers, others, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_the_cheapest_closure_equals_an_enumeration(seed):
    rng = random.Random(seed)
    count = rng.randint(1, 9)
    costs = [rng.randint(-9, 9) for _ in range(count)]
    needs = [rng.sample(range(count), rng.randint(0, min(3, count))) for _ in range(count)]
    closed = [
        taken
        for taken in (frozenset(n for n in range(count) if bits[n]) for bits in product((0, 1), repeat=count))
        if all(set(needs[item]) <= taken for item in taken)
    ]
    least = min(sum(costs[item] for item in taken) for taken in closed)
    best = [taken for taken in closed if sum(costs[item] for item in taken) == least]
    found = cheapest_closure(costs, needs)
    assert found in best
    assert all(found <= other for other in best)


def test_huge_costs_are_exact():
    assert cheapest_closure([-(10**40) - 1, 10**40], [[1], []]) == {0, 1}
    assert cheapest_closure([-(10**40), 10**40], [[1], []]) == frozenset()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_hull_is_the_lower_hull_of_all_policies(seed):
    profile = random_program(seed, num_ops=4)
    points = {(w.kept_bytes, ticks(w.recompute_seconds)) for w in every_policy(profile).values()}
    choices = Choices(profile)
    hull = choices.hull()
    for choice in hull:
        walked = working_set(profile, choices.policy(choice))
        assert (walked.kept_bytes, ticks(walked.recompute_seconds)) == (choice.num_bytes, choice.ticks)
    assert hull[0].ticks == min(time for _, time in points)
    assert hull[0].num_bytes == min(size for size, time in points if time == hull[0].ticks)
    assert hull[-1].num_bytes == min(size for size, _ in points)
    assert hull[-1].ticks == min(time for size, time in points if size == hull[-1].num_bytes)
    for left, right in pairwise(hull):
        assert left.num_bytes > right.num_bytes
        assert left.ticks < right.ticks
        rise, run = right.ticks - left.ticks, left.num_bytes - right.num_bytes
        for size, time in points:
            assert rise * size + run * time >= rise * left.num_bytes + run * left.ticks


@pytest.mark.parametrize("seed", SEEDS)
def test_points_between_hull_vertices_are_the_fastest_for_their_bytes(seed):
    profile = random_program(seed, num_ops=4)
    walked = every_policy(profile).values()
    choices = Choices(profile)
    for choice in between(choices, choices.hull(), 8):
        found = working_set(profile, choices.policy(choice))
        assert found.kept_bytes <= choice.num_bytes  # the limit that was asked for
        least = min(w.recompute_seconds for w in walked if w.kept_bytes <= choice.num_bytes)
        assert found.recompute_seconds <= least * 1.001 + 1e-12  # the gap that HiGHS may leave


@pytest.mark.parametrize("seed", SEEDS)
def test_options_are_policies_that_none_beats(seed):
    profile = random_program(seed, num_ops=4)
    everything = every_policy(profile)
    options = block_options(profile)
    costs = [(o.kept_bytes, o.recompute_seconds, o.working_bytes) for o in options]
    for each in options:
        assert each == option(profile, each.policy)
        assert each.policy in everything
    assert len(set(costs)) == len(costs)
    assert not any(below(a, b) for a in costs for b in costs)
    assert min(o.kept_bytes for o in options) == min(w.kept_bytes for w in everything.values())
    assert min(o.recompute_seconds for o in options) == 0
    for policy in special_policies(profile):
        special = option(profile, policy)
        costs_of = (special.kept_bytes, special.recompute_seconds, special.working_bytes)
        assert costs_of in costs or any(below(cost, costs_of) for cost in costs)


def test_small_working_sets_are_found():
    """A local search: on average within 2% of the smallest there is, which costs an enumeration."""
    excess = []
    for seed in range(60):
        profile = random_program(seed, num_ops=4)
        smallest = min(w.peak_bytes for w in every_policy(profile).values())
        found = min(each.working_bytes for each in block_options(profile))
        assert found >= smallest
        excess.append(found / smallest - 1)
    assert sum(excess) / len(excess) < 0.02


def test_a_block_like_llamas():
    block = llama_block()
    options = block_options(block)
    assert len(options) == 24
    plain, full = option(block, plain_policy(block)), option(block, full_policy(block))
    assert options[0].kept_bytes == plain.kept_bytes
    assert options[-1].kept_bytes == full.kept_bytes
    half = max(each.kept_bytes for each in options if each.kept_bytes <= plain.kept_bytes / 2)
    cheap = next(each for each in options if each.kept_bytes == half)
    assert cheap.recompute_seconds < 0.25 * full.recompute_seconds
    # Keeping nothing or everything, a block needs the most; what lies between needs less.
    assert min(each.working_bytes for each in options) < 0.6 * full.working_bytes
    assert len(block_options(block, max_options=8)) == 8
    assert block_options(block) == options


def test_a_value_that_cannot_be_kept_is_always_recomputed():
    nodes = [
        Node(storage_bytes=8, kind="input", keep_bytes=8),
        Node(storage_bytes=8),
        Node(storage_bytes=8, num_saved=1),
        Node(storage_bytes=8, num_saved=1, keep_bytes=8),
    ]
    ops = [OpCost(name="f", seconds=1.0, inputs=(n,), outputs=(n + 1,)) for n in range(3)]
    profile = program(nodes, ops)
    assert hull_points(profile) == [(16, 2.0), (8, 3.0)]


def test_narrowing_is_another_way_to_keep():
    nodes = [
        Node(storage_bytes=8, kind="input", num_saved=1, keep_bytes=8),
        Node(storage_bytes=100, num_saved=1, keep_bytes=100, narrow_bytes=25, narrow_seconds=1.0),
        Node(storage_bytes=100, num_saved=1, keep_bytes=100, must_keep=True, narrow_bytes=50, narrow_seconds=0.25),
    ]
    profile = program(nodes, [OpCost(name="f", seconds=9.0, inputs=(0,), outputs=(1,))])
    assert hull_points(profile) == [(208, 0.0), (158, 0.25), (83, 1.25), (58, 9.25)]
    policies = {each.kept_bytes: each.policy for each in block_options(profile)}
    assert policies[83] == Policy(program="p", kept=(0,), narrowed=(1, 2))
    assert policies[58] == Policy(program="p", kept=(0,), narrowed=(2,))


def test_a_program_that_saves_nothing_has_one_option():
    profile = program([Node(storage_bytes=8, kind="input", keep_bytes=8)], [])
    assert block_options(profile) == (
        Option(policy=Policy(program="p"), kept_bytes=0, recompute_seconds=0.0, working_bytes=0),
    )


def test_pruning_keeps_the_best_of_each_dimension_and_what_it_is_told():
    rng = random.Random(0)
    options = [
        Option(
            policy=Policy(program="p", kept=(number,)),
            kept_bytes=rng.randint(0, 1000),
            recompute_seconds=rng.random(),
            working_bytes=rng.randint(0, 1000),
        )
        for number in range(300)
    ]
    alive = prune(options, 300)
    spared = alive[len(alive) // 2].policy
    kept = prune(options, 10, [spared])
    assert len(kept) == 10
    assert spared in {each.policy for each in kept}
    assert set(kept) <= set(alive)
    for size in (lambda o: o.kept_bytes, lambda o: o.recompute_seconds, lambda o: o.working_bytes):
        assert min(map(size, kept)) == min(map(size, options))


def test_planning_takes_few_groups_and_cuts():
    """What planning time hangs on: the groups left to choose from, not the ops."""
    assert len(Choices(llama_block()).groups) == 15
