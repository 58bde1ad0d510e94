"""Plans for whole steps equal those of an enumeration of all combinations of options."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from memfit.errors import InfeasibleBudgetError, UsageError
from memfit.plans import Plan, Policy
from memfit.profiles import BlockCall, StepEvent, StepProfile
from memfit.solver import block_options, make_plan, overhead_bound, simulate, solve, switched
from memfit.solver.chain import fastest, room, smallest_budget
from memfit.solver.crossed import Crossed
from memfit.solver.frontier import Option
from memfit.solver.lifetimes import Chain, nested
from memfit.solver.peak import event_bytes, simulate_policies
from memfit.solver.planner import TIE
from memfit.solver.special import full_policy, plain_policy
from programs import MIB, chain_step, llama_block, micro_batches, random_program

SEEDS = range(12)


def random_step(seed: int, *, crossed: bool = False) -> StepProfile:
    """Three or four calls of two small programs; if ``crossed``, live frames are random."""
    rng = random.Random(seed)
    programs = [random_program(seed * 2 + number, num_ops=3, key=f"p{number}") for number in range(2)]
    picked = [rng.choice(programs) for _ in range(rng.choice([3, 4]))]
    step = chain_step(picked, outside=rng.randint(0, 20), loss=rng.randint(0, 30), gradients=rng.randint(0, 9))
    if crossed:
        calls = range(len(picked))
        events = [
            replace(event, live_calls=tuple(c for c in calls if c != event.call and rng.random() < 0.5))
            for event in step.events
        ]
        step = replace(step, events=tuple(events))
    return step


def few_options(step: StepProfile) -> dict[str, tuple[Option, ...]]:
    return {key: block_options(program, max_options=4) for key, program in step.programs.items()}


def only_chain(step: StepProfile, options: list[tuple[Option, ...]]) -> Chain:
    (chain,) = nested(step, options).chains
    return chain


def combinations(step: StepProfile) -> list[tuple[int, float]]:
    """Peak and seconds of every combination of options."""
    options = few_options(step)
    found = []
    for chosen in product(*(options[call.program] for call in step.calls)):
        kept, working = [each.kept_bytes for each in chosen], [each.working_bytes for each in chosen]
        peak = max(event_bytes(step, event, kept, working) for event in step.events)
        found.append((peak, sum(each.recompute_seconds for each in chosen)))
    return found


def budgets(found: list[tuple[int, float]]) -> Iterator[int]:
    """From the smallest peak to the largest."""
    peaks = sorted({peak for peak, _ in found})
    yield from dict.fromkeys([peaks[0], peaks[len(peaks) // 3], peaks[len(peaks) // 2], peaks[-1], peaks[-1] + 100])


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_plans_equal_an_enumeration(seed, crossed):
    step = random_step(seed, crossed=crossed)
    found = combinations(step)
    for budget in budgets(found):
        least = min(seconds for peak, seconds in found if peak <= budget)
        plan = solve(step, budget=budget, max_options=4)
        simulation = simulate(step, plan)
        assert simulation.peak_bytes == plan.predicted_peak_bytes <= budget
        assert simulation.event == plan.peak_event
        assert least - 1e-12 <= plan.recompute_seconds <= least * (1 + TIE) + 1e-12
        assert plan.budget_bytes == budget
        assert Plan.from_json(plan.to_json()) == plan
        assert solve(step, budget=budget, max_options=4) == plan


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_smallest_peak_equals_an_enumeration(seed, crossed):
    step = random_step(seed, crossed=crossed)
    found = combinations(step)
    smallest = min(peak for peak, _ in found)
    plan = solve(step, budget="min", max_options=4)
    assert plan.predicted_peak_bytes == plan.budget_bytes == smallest
    assert plan.recompute_seconds == pytest.approx(min(s for peak, s in found if peak == smallest), rel=TIE)
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(step, budget=smallest - 1, max_options=4)
    assert (caught.value.budget, caught.value.minimum) == (smallest - 1, smallest)
    assert caught.value.event == plan.peak_event or dict(simulate(step, plan).events)[caught.value.event] == smallest


@pytest.mark.parametrize("seed", SEEDS)
def test_no_plan_beats_the_bound(seed):
    step = random_step(seed, crossed=seed % 2 == 0)
    everything = combinations(step)
    for budget in budgets(everything):
        bound = overhead_bound(step, budget=budget)
        assert bound is not None
        assert bound <= min(seconds for peak, seconds in everything if peak <= budget) + 1e-12
    assert overhead_bound(step, budget=max(peak for peak, _ in everything)) == pytest.approx(0, abs=1e-12)


def test_a_coarse_grid_still_fits_and_still_finds_the_tightest_plan():
    block = llama_block()
    options = [block_options(block)] * 12
    chain = only_chain(chain_step([block] * 12, outside=5 * MIB, loss=200 * MIB), options)
    smallest = smallest_budget(chain, options)
    assert room(chain, options, smallest - 1) is None
    for budget in (smallest, smallest + 1, smallest + 50 * MIB, smallest + 200 * MIB):
        exact = fastest(chain, options, budget, cells=2**16)
        for cells in (16, 512):
            picked = fastest(chain, options, budget, cells=cells)
            held = 0
            for place, number in enumerate(picked):
                own = chain.own_need[place]
                assert held + own + options[place][number].working_bytes <= budget
                held += options[place][number].kept_bytes
            assert held + chain.need[-1] <= budget
            if cells == 512:
                time = sum(options[0][number].recompute_seconds for number in picked)
                assert time <= 1.02 * sum(options[0][number].recompute_seconds for number in exact)


@pytest.mark.parametrize("seed", range(40))
def test_any_grid_holds_any_budget_that_leaves_room(seed):
    """Cells of many bytes, limits in the middle of a cell."""
    rng = random.Random(seed)
    options = [
        [
            Option(
                policy=Policy(program="p", kept=(number,)),
                kept_bytes=rng.randint(0, 40),
                recompute_seconds=rng.randint(0, 20) * 1e-6,
                working_bytes=rng.randint(0, 60),
            )
            for number in range(4)
        ]
        for _ in range(6)
    ]
    chain = Chain(
        calls=tuple(range(6)),
        need=tuple(rng.choice([None, rng.randint(0, 30)]) for _ in range(7)),
        own_need=tuple(rng.randint(0, 30) for _ in range(6)),
    )
    smallest = smallest_budget(chain, options)
    assert room(chain, options, smallest - 1) is None
    for budget in range(smallest, smallest + 60, 3):
        for cells in (2, 5, 4096):
            picked = fastest(chain, options, budget, cells=cells)
            held = 0
            for place, number in enumerate(picked):
                assert chain.need[place] is None or held + chain.need[place] <= budget
                assert held + chain.own_need[place] + options[place][number].working_bytes <= budget
                held += options[place][number].kept_bytes
            assert chain.need[-1] is None or held + chain.need[-1] <= budget


def test_nested_lifetimes_are_one_chain():
    step = chain_step([llama_block()] * 3, outside=100, loss=7, gradients=10)
    found = nested(step, [block_options(llama_block())] * 3)
    (chain,) = found.chains
    forward = llama_block().forward_bytes
    assert chain.calls == (0, 1, 2)
    assert chain.need == (None, 100 + forward, 100 + forward, 107)
    assert found.static_bytes == 100 + forward  # the first forward: nothing is live that a plan changes
    assert chain.own_need == (130, 120, 110)


def test_micro_batches_are_chains_of_their_own():
    """Two micro-batches of two blocks, one after the other: the second's frames never meet the first's."""
    block = llama_block()
    first = chain_step([block] * 2, outside=1000, loss=50)
    both = micro_batches(first)
    assert [chain.calls for chain in nested(both, [block_options(block)] * 4).chains] == [(0, 1), (2, 3)]
    budget = solve(first, budget="min").predicted_peak_bytes + 20 * MIB
    one, two = solve(first, budget=budget), solve(both, budget=budget)
    assert two.predicted_peak_bytes == one.predicted_peak_bytes
    assert two.recompute_seconds == pytest.approx(2 * one.recompute_seconds)


def test_crossed_lifetimes_are_told_apart():
    """A frame that outlives one opened before it: the second call is still live when the first one's backward runs."""
    step = chain_step([llama_block()] * 2)
    options = [block_options(llama_block(), max_options=4)] * 2
    events = list(step.events)
    events[-2] = replace(events[-2], live_calls=(1,))
    crossed = replace(step, events=tuple(events))
    assert nested(step, options) is not None
    assert nested(crossed, options) is None
    # An event at which the second call lives without the first; a backward that finds the calls before it gone.
    after = StepEvent(name="after", kind="outside", live_calls=(1,))
    assert nested(replace(step, events=(*step.events, after)), options) is None
    alone = StepEvent(name="again", kind="backward", call=1)
    assert nested(replace(step, events=(*step.events, alone)), options) is None
    # Where the second call has no choice, there is nothing to cross.
    settled = nested(crossed, [options[0], options[1][:1]])
    (chain,) = settled.chains
    assert chain.calls == (0,)
    assert chain.own_need == (options[1][0].kept_bytes,)


def test_the_integer_program_agrees_with_the_chain_on_a_real_size():
    """Bytes of a model with a gigabyte of activations: HiGHS's tolerances must not decide."""
    block = llama_block()
    step = chain_step([block] * 6, outside=2**30, loss=2**27, gradients=28 * MIB)
    options = [block_options(block, max_options=8)] * 6
    crossed = Crossed(step, options)
    chain = only_chain(step, options)
    smallest = smallest_budget(chain, options)
    assert crossed.peak(crossed.smallest()) == pytest.approx(smallest, rel=1e-5)
    for budget in (smallest + 10 * MIB, smallest + 100 * MIB):
        by_rows, by_prefix = crossed.fastest(budget), fastest(chain, options, budget, cells=2**16)
        assert crossed.peak(by_rows) <= budget
        times = [sum(options[0][number].recompute_seconds for number in picked) for picked in (by_rows, by_prefix)]
        assert times[0] == pytest.approx(times[1], rel=1e-3)


def test_a_budget_for_everything_recomputes_nothing():
    step = chain_step([llama_block()] * 4, outside=MIB)
    plain = make_plan(step, [plain_policy(llama_block())] * 4, budget_bytes=None)
    plan = solve(step, budget=2 * plain.predicted_peak_bytes)
    assert (plan.recompute_seconds, plan.recomputed_bytes) == (0.0, 0)
    assert plan.predicted_peak_bytes == plan.plain_peak_bytes == plain.predicted_peak_bytes
    assert len(plan.policies) == 1
    assert plan.saved_bytes == plain.saved_bytes


def test_the_margin_stays_free():
    step = chain_step([llama_block()] * 4, outside=MIB)
    plain = switched(step, policy="plain").predicted_peak_bytes
    plan = solve(step, budget=plain, margin_bytes=50 * MIB)
    assert plan.predicted_peak_bytes <= plain - 50 * MIB
    assert plan.budget_bytes == plain
    smallest = solve(step, budget="min").predicted_peak_bytes
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(step, budget=smallest, margin_bytes=7)
    assert caught.value.minimum == smallest + 7


def test_infeasible_says_what_would_help():
    step = chain_step([llama_block()] * 2, outside=MIB, loss=2**30)
    with pytest.raises(InfeasibleBudgetError, match=r"at the loss\. Lower the batch size") as caught:
        solve(step, budget=2**20)
    assert caught.value.event == "loss"
    heavy = replace(step, events=(*step.events, StepEvent(name="optimizer", kind="outside", outside_bytes=2**40)))
    heavy = replace(heavy, events=(heavy.events[-1], *heavy.events[:2]))
    with pytest.raises(InfeasibleBudgetError, match=r"at the optimizer\. No activation is alive there") as caught:
        solve(heavy, budget=2**30)
    assert caught.value.minimum == 2**40


def test_a_step_without_blocks_is_planned():
    events = (StepEvent(name="loss", kind="outside", outside_bytes=100),)
    step = StepProfile(device="cpu", programs={}, calls=(), events=events)
    plan = solve(step, budget=100)
    assert (plan.predicted_peak_bytes, plan.peak_event, plan.policies, plan.calls) == (100, "loss", (), ())
    with pytest.raises(InfeasibleBudgetError):
        solve(step, budget=99)


def test_ties_go_to_the_lower_peak_and_to_fewer_policies():
    """With a loss that owns the peak whatever is kept, and room to spare, equal blocks get equal policies."""
    step = chain_step([llama_block()] * 12, outside=MIB)
    plain = switched(step, policy="plain").predicted_peak_bytes
    for part in (0.5, 0.7, 0.9):
        assert len(solve(step, budget=int(part * plain)).policies) <= 5


def test_switches_are_plans():
    block = llama_block()
    step = chain_step([block] * 6, outside=MIB)
    full = switched(step, policy="full")
    assert full.policies == (full_policy(block),)
    assert full.predicted_peak_bytes == simulate_policies(step, [full_policy(block)] * 6).peak_bytes
    third = switched(step, policy="full", every_n_layers=3)
    assert [call.policy for call in third.calls] == [0, 1, 1, 0, 1, 1]
    assert third.policies == (full_policy(block), plain_policy(block))
    assert third.recompute_seconds == pytest.approx(full.recompute_seconds / 3)
    selective = switched(step, policy="selective", model="M", fingerprint="f")
    assert full.saved_bytes < selective.saved_bytes < selective.saved_bytes + selective.recomputed_bytes
    assert (selective.model, selective.fingerprint, selective.budget_bytes) == ("M", "f", None)
    # At the peak of a switch, the solver is at least as fast, and usually much faster.
    for plan in (full, third, selective):
        best = solve(step, budget=plan.predicted_peak_bytes)
        assert best.recompute_seconds <= plan.recompute_seconds * (1 + TIE)


def test_a_block_called_twice_counts_once_for_every_n_layers():
    block = llama_block()
    step = chain_step([block] * 4)
    calls = tuple(BlockCall(name=f"layers.{number % 2}", program=block.key) for number in range(4))
    plan = switched(replace(step, calls=calls), policy="full", every_n_layers=2)
    assert [call.policy for call in plan.calls] == [0, 1, 0, 1]


@pytest.mark.parametrize("options", [{"policy": "half"}, {"every_n_layers": 0}, {"every_n_layers": True}])
def test_switches_that_do_not_exist_are_refused(options):
    with pytest.raises(UsageError, match="`"):
        switched(chain_step([llama_block()]), **options)


def test_saved_and_recomputed_bytes_add_up():
    """What autograd would hold is held or recomputed; held inputs that autograd would not hold come on top."""
    step = chain_step([llama_block()] * 3, outside=MIB)
    plain = switched(step, policy="plain")
    for plan in (solve(step, budget="min"), switched(step), solve(step, budget=plain.predicted_peak_bytes - 30 * MIB)):
        assert plan.saved_bytes + plan.recomputed_bytes == plain.saved_bytes


def test_eighty_equal_blocks_have_one_frontier_and_a_small_grid():
    """Planning time hangs on options times cells times calls; options of equal programs are found once."""
    step = chain_step([llama_block()] * 80, outside=2**30, loss=2**28, gradients=28 * MIB)
    assert len(step.programs) == 1
    plan = solve(step, budget=5 * 2**30)
    bound = overhead_bound(step, budget=5 * 2**30)
    assert bound <= plan.recompute_seconds <= 1.05 * bound
    assert len(plan.policies) <= 6
