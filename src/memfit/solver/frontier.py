"""The options of a block: what can be bought with bytes, in three dimensions.

An option is (kept bytes, recompute seconds, working set of the backward pass). The first two come from the exact lower
hull of all policies, with points in its gaps; the third is walked for each, since it is not monotone in what is kept: a
block that keeps nothing brings everything back at its first unpack, and one that keeps everything has it all there too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, pairwise

import numpy as np
import numpy.typing as npt

from memfit.plans import Policy
from memfit.profiles import ProgramProfile
from memfit.solver.choices import TICKS, Choice, Choices
from memfit.solver.milp import MICROSECOND, Program, Solver, byte_unit
from memfit.solver.special import full_policy, plain_policy, selective_policy
from memfit.solver.working_set import WorkingSet, working_set

Numbers = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
_SEARCH_EVENTS = 12_000
"""How many timeline events the search for small working sets walks, all its policies together."""
_CANDIDATES = 3
"""How many times as many options as asked for are walked before the least useful ones go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One policy of a program and what it costs.

    Attributes:
        policy: The policy.
        kept_bytes: What a call's frame holds from its forward to its backward pass.
        recompute_seconds: Time that it adds to a step.
        working_bytes: What the backward pass needs, ``kept_bytes`` included.
    """

    policy: Policy
    kept_bytes: int
    recompute_seconds: float
    working_bytes: int


@lru_cache(maxsize=64)  # plans of one step for many budgets ask again
def block_options(program: ProgramProfile, *, max_options: int = 24) -> tuple[Option, ...]:
    """The options of a program worth choosing between, from most kept bytes to fewest.

    None is at least as good as another in all three dimensions. Those that keep the fewest bytes, take the least time
    and have the smallest working set are always among them; saving everything, full and selective activation
    checkpointing are too, unless another is at least as good in every dimension.

    Args:
        program: What the block costs.
        max_options: Of more, those are dropped whose best substitute is closest.
    """
    choices = Choices(program)
    hull = choices.hull()
    policies = [choices.policy(choice) for choice in _thin(hull, _CANDIDATES * max_options)]
    policies += [choices.policy(choice) for choice in between(choices, hull, max_options // 2)]
    special = special_policies(program)
    walked = {policy: option(program, policy) for policy in dict.fromkeys(special + policies)}
    descend(choices, walked)
    return prune(walked.values(), max_options, special)


def special_policies(program: ProgramProfile) -> list[Policy]:
    """Today's switches: save everything, selective and full activation checkpointing."""
    return [plain_policy(program), selective_policy(program), full_policy(program)]


def option(program: ProgramProfile, policy: Policy) -> Option:
    """What one policy costs."""
    return as_option(policy, working_set(program, policy))


def as_option(policy: Policy, walked: WorkingSet) -> Option:
    """A walked policy as an option."""
    return Option(
        policy=policy,
        kept_bytes=walked.kept_bytes,
        recompute_seconds=walked.recompute_seconds,
        working_bytes=walked.peak_bytes,
    )


def hull_points(program: ProgramProfile) -> list[tuple[int, float]]:
    """Kept bytes and recompute seconds along the lower hull of all policies, from most bytes to fewest: a bound."""
    return [(choice.num_bytes, choice.ticks / TICKS) for choice in Choices(program).hull()]


def between(choices: Choices, hull: list[Choice], count: int) -> list[Choice]:
    """The fastest choices at byte limits inside the widest gaps of the hull, by MILP."""
    span = hull[0].num_bytes - hull[-1].num_bytes
    limits = []
    for left, right in pairwise(hull):
        gap = left.num_bytes - right.num_bytes
        parts = gap * count // span if span else 0
        limits += [right.num_bytes + gap * part // (parts + 1) for part in range(1, parts + 1)]
    if not limits:
        return []
    integer = _Integer(choices)
    found = (integer.fastest(limit) for limit in limits)
    return [choice for choice in found if choice is not None]


def descend(choices: Choices, walked: dict[Policy, Option]) -> None:
    """Add options with smaller working sets, one node kept, narrowed or dropped at a time, from the smallest known.

    Nothing convex describes a working set, so this is a local search, within a fixed number of timeline events.
    """
    program = choices.program
    size = len(program.timeline) + len(program.ops) + 1
    nodes = sorted(node for node in choices.ways if program.nodes[node].num_saved and node not in choices.forced)

    def weight(each: Option) -> tuple[int, int, float]:
        return each.working_bytes, each.kept_bytes, each.recompute_seconds

    best = min(walked.values(), key=weight)
    left = _SEARCH_EVENTS // size
    since = 0  # nodes tried since the last improvement
    for node in cycle(nodes):
        since += 1
        for policy in choices.flipped(best.policy, node):
            if policy not in walked:
                walked[policy] = option(program, policy)
                left -= 1
            if weight(walked[policy]) < weight(best):
                best, since = walked[policy], 0
        if left <= 0 or since > len(nodes):
            return


class _Integer:
    """The choices of a program as an integer program: time is least, bytes are limited."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        program = Program()
        self.unit = byte_unit(sum(way.num_bytes for ways in choices.ways.values() for way in ways))
        tick = 1 / (TICKS * MICROSECOND)
        self.groups = [
            program.variable(group.ticks * tick, lower=float(number in choices.always), integer=True)
            for number, group in enumerate(choices.groups)
        ]
        for number, group in enumerate(choices.groups):
            for other in group.needs:
                program.row({self.groups[number]: -1.0, self.groups[other]: 1.0}, lower=0.0)
        weights: dict[int, float] = {}
        self.ways: dict[tuple[int, int], int] = {}

        def keep(node: int) -> dict[int, float]:
            for place, way in enumerate(choices.ways[node]):
                if (node, place) not in self.ways:
                    self.ways[node, place] = program.variable(way.ticks * tick, integer=True)
                    weights[self.ways[node, place]] = way.num_bytes / self.unit
            return {self.ways[node, place]: 1.0 for place in range(len(choices.ways[node]))}

        for number, group in enumerate(choices.groups):
            for node in group.drops:
                if node in choices.ways:
                    program.row({**keep(node), self.groups[number]: 1.0}, lower=1.0)
            for node in group.holds:
                program.row({**keep(node), self.groups[number]: -1.0}, lower=0.0)
        for node in choices.single:
            program.row(keep(node), lower=1.0)
        self.limit = program.row(weights)
        self.solver = Solver(program, gap=1e-3, max_nodes=200)

    def fastest(self, limit: int) -> Choice | None:
        """The fastest choice found that keeps at most ``limit`` bytes."""
        self.solver.limit(self.limit, limit / self.unit)
        values = self.solver.solve()
        if values is None:
            return None
        run = frozenset(number for number, column in enumerate(self.groups) if values[column] > 0.5)
        narrowed = {node for (node, place), column in self.ways.items() if place and values[column] > 0.5}
        dropped = {node for number in run for node in self.choices.groups[number].drops}
        return Choice(num_bytes=limit, ticks=0, run=run, narrowed=frozenset(narrowed - dropped))


def prune(options: Iterable[Option], max_options: int, special: Iterable[Policy] = ()) -> tuple[Option, ...]:
    """Drop what another option beats in all three dimensions, then what another option nearly replaces.

    Policies in ``special`` are only dropped for an option that is at least as good in all three.
    """
    ordered = sorted(options, key=lambda each: (-each.kept_bytes, each.recompute_seconds, each.working_bytes))
    unique = list({_numbers(each): each for each in reversed(ordered)}.values())[::-1]
    survivors = [each for each in unique if not any(_beats(other, each) for other in unique)]
    numbers = np.array([_numbers(each) for each in survivors])
    spans = np.maximum(numbers.max(0) - numbers.min(0), 1e-30)
    costs = (numbers - numbers.min(0)) / spans
    costs[:, 1] = np.log(costs[:, 1] + 0.02)  # twice as slow matters more where little is recomputed
    costs[:, 1] -= costs[:, 1].min()
    costs[:, 1] /= max(costs[:, 1].max(), 1e-30)
    best = [np.lexsort(np.roll(numbers, -dimension, axis=1).T[::-1])[0] for dimension in range(3)]
    spared = np.isin(np.arange(len(survivors)), best)
    spared |= [each.policy in set(special) for each in survivors]
    # Most places go to bytes against time, which every call of the block sees; the rest to smaller working sets.
    flat = ~((costs[None, :, :2] <= costs[:, None, :2]).all(2) & (costs[None] != costs[:, None]).any(2)).any(1)
    spared |= _spread(costs[:, :2], flat, spared, max_options * 3 // 4)
    left = _spread(costs, np.ones(len(survivors), dtype=np.bool_), spared, max_options)
    return tuple(each for each, stays in zip(survivors, left, strict=True) if stays)


def _spread(costs: Numbers, among: Flags, spared: Flags, count: int) -> Flags:
    """Which of ``among`` stay when all but ``count`` go, first those whose best substitute is closest."""
    # How much worse than option i, in its worst dimension, option j is.
    worse = (costs[None] - costs[:, None]).max(2)
    np.fill_diagonal(worse, np.inf)
    worse[spared] = np.inf
    left = among.copy()
    while left.sum() > count:
        substitute = np.where(left, worse[:, left].min(1), np.inf)
        if substitute.min() == np.inf:
            break
        left[int(substitute.argmin())] = False
    return left


def _beats(other: Option, each: Option) -> bool:
    theirs, ours = _numbers(other), _numbers(each)
    return theirs != ours and all(their <= our for their, our in zip(theirs, ours, strict=True))


def _numbers(each: Option) -> tuple[float, float, float]:
    return each.kept_bytes, each.recompute_seconds, each.working_bytes


def _thin(hull: list[Choice], count: int) -> list[Choice]:
    """At most about ``count`` points of a hull, evenly spread over its bytes; both ends stay."""
    if len(hull) <= count:
        return hull
    step = max(1, (hull[0].num_bytes - hull[-1].num_bytes) // count)
    found = [hull[0]]
    for choice in hull[1:-1]:
        if found[-1].num_bytes - choice.num_bytes >= step:
            found.append(choice)
    return [*found, hull[-1]]
