"""Plans that drop block inputs: priced by one definition, equal to an enumeration, lower peaks than without."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from memfit.errors import InfeasibleBudgetError, PlanError
from memfit.plans import Plan, Policy
from memfit.profiles import Link, Node, OpCost, ProgramProfile, StepProfile
from memfit.solver import block_options, simulate, solve, switched
from memfit.solver.frontier import Option
from memfit.solver.lifetimes import nested
from memfit.solver.linked import DEPTH, LinkedChain, LinkedSearch
from memfit.solver.links import Returned, kept_input, restored, returned, settled
from memfit.solver.peak import simulate_policies
from memfit.solver.planner import TIE
from memfit.solver.special import full_policy
from memfit.solver.variants import Variants
from memfit.solver.working_set import working_set
from programs import MIB, chain_step, llama_block, micro_batches, program, random_program, release_at_once

SEEDS = range(40)


def linked(step: StepProfile, *, of: int = 0, but: tuple[int, ...] = ()) -> StepProfile:
    """The step with input ``of`` of every call tied to the only output of the call before; not those in ``but``."""
    calls = [
        replace(call, link=Link(input=of, output=step.programs[step.calls[number - 1].program].outputs[0]))
        if number and number not in but
        else call
        for number, call in enumerate(step.calls)
    ]
    return replace(step, calls=tuple(calls))


def unlinked(step: StepProfile) -> StepProfile:
    return replace(step, calls=tuple(replace(call, link=None) for call in step.calls))


def wide_block(*, key: str = "p", width: int = 100) -> ProgramProfile:
    """x -> u -> v, saved -> out = v + x: what is dear to hold is the input."""
    nodes = [
        Node(storage_bytes=width, kind="input", num_saved=1, keep_bytes=width),
        Node(storage_bytes=20),
        Node(storage_bytes=30, num_saved=1, keep_bytes=30),
        Node(storage_bytes=width),
    ]
    ops = [
        OpCost(name="f", seconds=1.0, inputs=(0,), outputs=(1,)),
        OpCost(name="g", seconds=2.0, inputs=(1,), outputs=(2,)),
        OpCost(name="add", seconds=4.0, inputs=(0, 2), outputs=(3,)),
    ]
    return program(nodes, ops, key=key, timeline=release_at_once((0, 2), {0: 7, 1: 9}), forward_bytes=60)


# What a link costs -------------------------------------------------------------------------------------------------


def test_the_recipe_of_an_output_by_hand():
    block = wide_block()
    assert returned(block, Policy(program="p", kept=(0,))) is None
    kept = Policy(program="p", kept=(0,), returned=3)
    assert returned(block, kept) == Returned(seconds=7.0, peak_bytes=30 + 100, reads_link=False)
    middle = Policy(program="p", kept=(0, 2), returned=3)
    assert returned(block, middle) == Returned(seconds=4.0, peak_bytes=100, reads_link=False)
    deeper = Policy(program="p", kept=(2,), linked=0, returned=3)
    assert returned(block, deeper) == Returned(seconds=4.0, peak_bytes=200, reads_link=True)
    assert returned(block, Policy(program="p", kept=(2,), returned=3)) is None  # nothing brings the input
    assert returned(block, replace(deeper, returned=0)) == Returned(seconds=0.0, peak_bytes=100, reads_link=True)
    assert returned(block, replace(kept, returned=0)) is None  # held anyway: dropping it elsewhere frees nothing


def test_a_linked_input_comes_back_at_its_first_use():
    """v is unpacked first and needs x: then x, u, v are there; v goes, x is unpacked; x goes."""
    block = wide_block()
    held = working_set(block, Policy(program="p", kept=(0,)))
    dropped = working_set(block, Policy(program="p", linked=0))
    assert (held.kept_bytes, held.peak_bytes, held.link_bytes) == (100, 100 + 20 + 30, None)
    assert (dropped.kept_bytes, dropped.peak_bytes, dropped.link_bytes) == (0, 100 + 20 + 30, 0)
    assert dropped.recompute_seconds == held.recompute_seconds == 3.0
    late = working_set(block, Policy(program="p", kept=(2,), linked=0))
    assert (late.kept_bytes, late.peak_bytes, late.link_bytes) == (30, 100 + 7, 0)


def test_links_are_in_the_peak_of_a_step():
    step = linked(chain_step([wide_block()] * 3, outside=1000))
    first = Policy(program="p", kept=(0,), returned=3)
    second = Policy(program="p", linked=0, returned=3)
    third = Policy(program="p", kept=(2,), linked=0)
    assert [each and (each.seconds, each.peak_bytes) for each in restored(step, [first, second, third])] == [
        None,
        (7.0, 130),
        (14.0, 230),
    ]
    found = simulate_policies(step, [first, second, third])
    assert found.kept_bytes == (100, 0, 30)
    assert found.recompute_seconds == 3.0 + (3.0 + 7.0) + 14.0
    assert dict(found.events) == {
        "forward of layers.0": 1000 + 60,
        "forward of layers.1": 1000 + 100 + 60,
        "forward of layers.2": 1000 + 100 + 60,
        "loss": 1000 + 130,
        "backward of layers.2": 1000 + 100 + 230,  # its own value is gone by then
        "backward of layers.1": 1000 + 100 + 150,
        "backward of layers.0": 1000 + 150,
        "optimizer": 1000,
    }


def test_links_that_are_none_are_refused_or_undone():
    step = linked(chain_step([wide_block()] * 3), but=(2,))
    first = Policy(program="p", kept=(0,), returned=3)
    last = Policy(program="p", linked=0)
    for wrong in (
        [last, first, first],  # nothing is before it
        [replace(first, returned=None), last, first],  # the call before does not bring it back
        [Policy(program="p", kept=(0, 2), returned=2), last, first],  # it is held anyway
        [first, first, last],  # another tensor enters
    ):
        with pytest.raises(PlanError, match=r"of `layers\.\d`, which the block call before does not bring back"):
            simulate_policies(step, wrong)
        undone = settled(step, wrong)
        assert simulate_policies(step, undone).recompute_seconds > 0
        assert all(now.linked is None for now in undone)
    assert settled(step, [first, last, first]) == [first, last, first]
    assert kept_input(Policy(program="p", kept=(2,), narrowed=(1,), linked=0, returned=3)) == Policy(
        program="p", kept=(0, 2), narrowed=(1,), returned=3
    )


# Against an enumeration --------------------------------------------------------------------------------------------


def random_step(seed: int) -> StepProfile:
    rng = random.Random(seed)
    programs = [random_program(seed * 2 + number, num_ops=3, key=f"p{number}") for number in range(2)]
    # What is saved and returned is held by the next block: a link would free nothing.
    picked = [rng.choice(programs) for _ in range(rng.choice([3, 4]))]
    step = chain_step(picked, outside=rng.randint(0, 20), loss=rng.randint(0, 30), gradients=rng.randint(0, 9))
    return linked(step, of=rng.choice([0, 2]), but=(rng.randint(0, 6),))


def few_options(step: StepProfile) -> list[tuple[Option, ...]]:
    made = {key: block_options(each, max_options=3) for key, each in step.programs.items()}
    return [made[call.program] for call in step.calls]


def combinations(step: StepProfile, options: list[tuple[Option, ...]]) -> Iterator[tuple[int, float, list[Policy]]]:
    """Peak and seconds of every combination of variants that simulates."""
    variants = Variants({call.program: options[number] for number, call in enumerate(step.calls)}, step.programs)
    choices = []
    for number, call in enumerate(step.calls):
        after = step.calls[number + 1].link if number + 1 < len(step.calls) else None
        ends = call.link.input if call.link else None, after.output if after else None
        choices.append([each.option.policy for each in variants.of(call.program, *ends)])
    for policies in product(*choices):
        try:
            found = simulate_policies(step, policies)
        except PlanError:
            continue
        yield found.peak_bytes, found.recompute_seconds, list(policies)


@pytest.mark.parametrize("seed", SEEDS)
def test_linked_plans_equal_an_enumeration(seed):
    """Bytes are never too few, so a plan may be missed, where the dearest way back is what does not fit; rarely."""
    step = random_step(seed)
    options = few_options(step)
    found = list(combinations(step, options))
    search = LinkedSearch(step, options, nested(step, options), max(peak for peak, _, _ in found))
    smallest = search.smallest_peak()
    assert smallest >= min(peak for peak, _, _ in found)
    assert search.within(smallest - 1) is None
    peaks = sorted({peak for peak, _, _ in found if peak >= smallest})
    for budget in (smallest, *peaks[:: max(1, len(peaks) // 6)]):
        picked = simulate_policies(step, search.within(budget))
        assert picked.peak_bytes <= budget
        least = min(seconds for peak, seconds, _ in found if peak <= budget)
        assert picked.recompute_seconds >= least - 1e-12
        if seed not in CONSERVATIVE:
            assert picked.recompute_seconds == pytest.approx(least, abs=1e-12)
    if seed not in CONSERVATIVE:
        assert smallest == min(peak for peak, _, _ in found)


CONSERVATIVE = {22}
"""Where the dearest way back does not fit and another would: the smallest peak found is 52 and not 47."""


@pytest.mark.parametrize("seed", SEEDS)
def test_the_smallest_peak_is_never_higher_than_without_links(seed):
    step = random_step(seed)
    without = solve(unlinked(step), budget="min")
    plan = solve(step, budget="min")
    assert plan.predicted_peak_bytes == plan.budget_bytes == simulate(step, plan).peak_bytes
    assert plan.predicted_peak_bytes <= without.predicted_peak_bytes
    if plan.predicted_peak_bytes == without.predicted_peak_bytes:
        assert plan.recompute_seconds <= without.recompute_seconds * (1 + TIE)
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(step, budget=plan.predicted_peak_bytes - 1)
    assert caught.value.minimum == plan.predicted_peak_bytes
    assert solve(step, budget=plan.predicted_peak_bytes).predicted_peak_bytes == plan.predicted_peak_bytes


# Real sizes --------------------------------------------------------------------------------------------------------


def test_the_smallest_peak_of_24_blocks_falls():
    """What was kept for every block, its input, is kept for about every third one."""
    block = llama_block()
    step = chain_step([block] * 24, loss=MIB)
    before, after = solve(step, budget="min"), solve(linked(step), budget="min")
    assert before.predicted_peak_bytes == 158 * MIB + 16 * 2**10
    assert after.predicted_peak_bytes == 98 * MIB + 16 * 2**10
    drops = [after.policy(number).linked is not None for number in range(24)]
    assert sum(drops) == 20
    assert Plan.from_json(after.to_json()) == after
    assert solve(linked(step), budget="min") == after
    halfway = (before.predicted_peak_bytes + after.predicted_peak_bytes) // 2
    plan = solve(linked(step), budget=halfway)
    assert plan.predicted_peak_bytes <= halfway
    assert before.recompute_seconds < plan.recompute_seconds < after.recompute_seconds
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(linked(step), budget=after.predicted_peak_bytes - 1)
    assert caught.value.minimum == after.predicted_peak_bytes
    assert caught.value.event == after.peak_event


def test_no_row_of_dropped_inputs_is_longer_than_it_may_be():
    """Bring an input back through d calls and each of them runs again; d^2 / 2 for all of them."""
    step = linked(chain_step([wide_block(width=1000)] * 27))
    plan = solve(step, budget="min")
    row = longest = 0
    for number in range(27):
        row = row + 1 if plan.policy(number).linked is not None else 0
        longest = max(longest, row)
    assert longest == DEPTH


def test_plans_with_room_are_what_they_were():
    block = llama_block()
    step = chain_step([block] * 24, outside=MIB, loss=MIB, gradients=MIB)
    smallest = solve(step, budget="min").predicted_peak_bytes
    plain = switched(step, policy="plain").predicted_peak_bytes
    for part in (0.1, 0.3, 0.6, 1.0):
        budget = int(smallest + part * (plain - smallest))
        assert solve(linked(step), budget=budget) == solve(step, budget=budget)
    assert switched(linked(step)) == switched(step)
    assert switched(linked(step), policy="selective", every_n_layers=2) == switched(
        step, policy="selective", every_n_layers=2
    )


def test_micro_batches_are_linked_inside_only():
    """Two of them, one after the other: the first block of the second takes nothing from the first."""
    first = linked(chain_step([llama_block()] * 6, outside=1000))
    both = micro_batches(first)
    one, two = solve(first, budget="min"), solve(both, budget="min")
    assert one.predicted_peak_bytes == two.predicted_peak_bytes < solve(unlinked(first), budget="min").budget_bytes
    assert two.recompute_seconds == pytest.approx(2 * one.recompute_seconds)
    assert two.policy(6).linked is None


def test_lifetimes_that_cross_have_no_links():
    """A frame that goes before the next one's backward cannot bring anything back: inputs are kept."""
    step = linked(chain_step([wide_block()] * 3))
    events = list(step.events)
    events[4] = replace(events[4], live_calls=(0,))  # the backward of the last block finds the second one gone
    plan = solve(replace(step, events=tuple(events)), budget="min")
    assert all(policy.linked is None for policy in plan.policies)


def test_a_tight_plan_with_links_may_be_the_faster_one():
    block = llama_block()
    step = chain_step([block] * 24, loss=MIB)
    budget = solve(step, budget="min").predicted_peak_bytes
    without, plan = solve(step, budget=budget), solve(linked(step), budget=budget)
    assert plan.predicted_peak_bytes <= budget
    assert plan.recompute_seconds < without.recompute_seconds


def test_eighty_equal_blocks_have_few_moves():
    """Planning time hangs on moves times cells times calls."""
    step = linked(chain_step([llama_block()] * 80, outside=2**30))
    options = [block_options(llama_block())] * 80
    (chain,) = nested(step, options).chains
    made = LinkedChain(step, chain, Variants({"llama": options[0]}, step.programs))
    assert len({id(place) for place in made.places}) <= 4
    assert max(len(place.moves) for place in made.places) <= 24 + 3 * 18
    full = full_policy(llama_block())
    assert any(each.option.policy.kept == full.kept[1:] for each in made.places[40].variants)
