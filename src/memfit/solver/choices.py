"""What can be chosen in one program, reduced to groups of ops, and the exact lower hull of its cost.

With y_n = node n is there in the backward pass and r_i = op i runs again: r_i <= y_n for each input n of i, y_n >= r_i
for the op i that makes n, and kept bytes = sum of b_n (y_n - r_producer(n)). Every saved node is there (y_n = 1),
parameters are always there, and a computed node that autograd does not save is there only if its op runs. So what is
left to choose is a set of ops closed under "reads the unsaved output of", and the block inputs that those ops read. Ops
are linked only through unsaved values, hence the problem falls into many small components: the hull of the whole is the
sum of theirs.

A node that is not recomputed is kept in the cheapest of its ways: as it is, or narrowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

from memfit.plans import Policy
from memfit.profiles import ProgramProfile
from memfit.solver.cuts import cheapest_closure
from memfit.solver.special import can_keep, forced_nodes, minimal_policy, runnable_ops

TICKS = 10**12
"""Ticks per second. Times are integers here, so that cuts are exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to keep a node: bytes in the frame, ticks of time."""

    num_bytes: int
    ticks: int
    narrowed: bool


@dataclass(slots=True, kw_only=True)
class Group:
    """Ops that run again together, or not at all.

    Attributes:
        ops: Their indices.
        ticks: Time of one run.
        drops: Saved nodes that need not be kept if the group runs.
        holds: Block inputs, not saved by autograd, that have to be kept if the group runs.
        needs: Groups that have to run with it.
    """

    ops: list[int] = field(default_factory=list)
    ticks: int = 0
    drops: list[int] = field(default_factory=list)
    holds: list[int] = field(default_factory=list)
    needs: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One closed set of groups of a component, every other node of it kept in some way.

    Attributes:
        num_bytes: Kept.
        ticks: Spent on recomputing and narrowing.
        run: Groups that run again.
        narrowed: Nodes that are kept in narrow form.
    """

    num_bytes: int
    ticks: int
    run: frozenset[int] = frozenset()
    narrowed: frozenset[int] = frozenset()

    def __add__(self, other: Choice) -> Choice:
        return Choice(
            num_bytes=self.num_bytes + other.num_bytes,
            ticks=self.ticks + other.ticks,
            run=self.run | other.run,
            narrowed=self.narrowed | other.narrowed,
        )


class Choices:
    """The groups of a program and what every policy of it has in common.

    Attributes:
        groups: What may run again.
        always: Groups that always run: they make saved values that cannot be kept.
        ways: For every node that may be kept: how.
        single: Saved nodes that no group makes: always kept, in one of their ways.
    """

    def __init__(self, program: ProgramProfile) -> None:
        self.program = program
        runnable = runnable_ops(program)
        self.forced = forced_nodes(program, runnable)
        self.ways = {index: _ways(program, index) for index in range(len(program.nodes)) if can_keep(program, index)}
        self.groups = _group(program, runnable, self.forced)
        made = {node for group in self.groups for node in group.drops}
        self.single = sorted(node for node in set(program.saved) if node in self.ways and node not in made)
        self.always: set[int] = set()
        stack = [n for n, group in enumerate(self.groups) if any(node not in self.ways for node in group.drops)]
        while stack:
            number = stack.pop()
            if number not in self.always:
                self.always.add(number)
                stack.extend(self.groups[number].needs)

    def policy(self, choice: Choice) -> Policy:
        """The policy that a choice for the whole program means."""
        kept = {node for node in self.program.saved if node in self.ways}
        for number in choice.run:
            kept.difference_update(self.groups[number].drops)
            kept.update(self.groups[number].holds)
        # Block inputs that cost nothing are always there.
        kept.update(n for n in self.ways if self.program.nodes[n].keep_bytes == 0 and n not in self.program.saved)
        return minimal_policy(self.program, kept, choice.narrowed)

    def flipped(self, policy: Policy, node: int) -> list[Policy]:
        """The policies that treat one saved node otherwise."""
        kept, narrowed = set(policy.kept), frozenset(policy.narrowed)
        # Block inputs that a recipe might need now; those that none needs go again.
        inputs = {n for n in self.ways if self.program.nodes[n].kind == "input"}
        base = (kept | inputs) - narrowed - {node}
        found = [minimal_policy(self.program, base, narrowed - {node})]
        if node in narrowed or len(self.ways[node]) == 2:
            found.append(minimal_policy(self.program, base, narrowed | {node}))
        found.append(minimal_policy(self.program, base | {node}, narrowed - {node}))
        return [each for each in found if each != policy]

    def hull(self) -> list[Choice]:
        """The lower convex hull of (bytes, seconds) over all policies, from most bytes to fewest.

        Points in the middle of an edge of the hull are among them where components give such points.
        """
        total = Choice(num_bytes=0, ticks=0)
        moves: list[tuple[Fraction, int, Choice, Choice]] = []
        for number, (groups, nodes) in enumerate(self.components()):
            vertices = _hull(_Component(self, groups, nodes))
            total += vertices[0]
            for before, after in pairwise(vertices):
                slope = Fraction(after.ticks - before.ticks, before.num_bytes - after.num_bytes)
                moves.append((slope, number, before, after))
        moves.sort(key=lambda move: move[:2])  # stable: the moves of one component stay in order
        points = [total]
        for _, _, before, after in moves:
            total = Choice(
                num_bytes=total.num_bytes - before.num_bytes + after.num_bytes,
                ticks=total.ticks - before.ticks + after.ticks,
                run=(total.run - before.run) | after.run,
                narrowed=(total.narrowed - before.narrowed) | after.narrowed,
            )
            points.append(total)
        return points

    def components(self) -> list[tuple[list[int], list[int]]]:
        """Groups linked by needs or by shared inputs, with the nodes that they keep or drop; then every single node."""
        owner = list(range(len(self.groups)))

        def find(number: int) -> int:
            while owner[number] != number:
                owner[number] = owner[owner[number]]
                number = owner[number]
            return number

        holder: dict[int, int] = {}
        for number, group in enumerate(self.groups):
            for other in group.needs:
                owner[find(other)] = find(number)
            for node in group.holds:
                owner[find(holder.setdefault(node, number))] = find(number)
        members: dict[int, list[int]] = {}
        for number in range(len(self.groups)):
            members.setdefault(find(number), []).append(number)
        found = []
        for groups in members.values():
            nodes = {node for number in groups for node in self.groups[number].drops if node in self.ways}
            nodes.update(node for number in groups for node in self.groups[number].holds)
            found.append((groups, sorted(nodes)))
        return found + [([], [node]) for node in self.single]


class _Component:
    """One component, priced."""

    def __init__(self, choices: Choices, groups: list[int], nodes: list[int]) -> None:
        self.choices = choices
        self.groups = groups
        self.nodes = nodes
        self.holds = sorted({node for number in groups for node in choices.groups[number].holds})
        position = {number: place for place, number in enumerate(groups)}
        held = {node: len(groups) + place for place, node in enumerate(self.holds)}
        self.needs = [
            [position[other] for other in sorted(choices.groups[number].needs)]
            + [held[node] for node in choices.groups[number].holds]
            for number in groups
        ] + [[] for _ in self.holds]
        ways = [way for node in nodes for way in choices.ways[node]]
        self.most_bytes = 1 + sum(way.num_bytes for way in ways)
        self.most_ticks = 1 + sum(choices.groups[number].ticks for number in groups) + sum(way.ticks for way in ways)

    def cheapest(self, per_byte: int, per_tick: int) -> Choice:
        """The choice that costs least at this price."""
        choices = self.choices
        best = {
            node: min(choices.ways[node], key=lambda way: per_byte * way.num_bytes + per_tick * way.ticks)
            for node in self.nodes
        }
        price = {node: per_byte * way.num_bytes + per_tick * way.ticks for node, way in best.items()}
        costs = []
        for number in self.groups:
            group = choices.groups[number]
            cost = per_tick * group.ticks - sum(price[node] for node in group.drops if node in price)
            if number in choices.always:
                cost -= 2 * (per_byte * self.most_bytes + per_tick * self.most_ticks)
            costs.append(cost)
        costs += [price[node] for node in self.holds]
        taken = cheapest_closure(costs, self.needs)
        run = frozenset(number for place, number in enumerate(self.groups) if place in taken)
        kept = set(self.nodes) - set(self.holds)
        for number in run:
            kept.difference_update(choices.groups[number].drops)
            kept.update(choices.groups[number].holds)
        return Choice(
            num_bytes=sum(best[node].num_bytes for node in kept),
            ticks=sum(best[node].ticks for node in kept) + sum(choices.groups[number].ticks for number in run),
            run=run,
            narrowed=frozenset(node for node in kept if best[node].narrowed),
        )


def _hull(component: _Component) -> list[Choice]:
    """Vertices from most bytes to fewest, found by asking at the slope between two known ones."""
    fastest = component.cheapest(1, component.most_bytes)
    smallest = component.cheapest(component.most_ticks, 1)
    found = [fastest]
    stack = [(fastest, smallest)]
    while stack:
        left, right = stack.pop()
        if right.num_bytes >= left.num_bytes:
            continue
        per_byte, per_tick = right.ticks - left.ticks, left.num_bytes - right.num_bytes
        middle = component.cheapest(per_byte, per_tick)
        line = per_byte * left.num_bytes + per_tick * left.ticks
        if per_byte * middle.num_bytes + per_tick * middle.ticks < line:
            stack += ((middle, right), (left, middle))
        else:
            found.append(right)
    return found


def _ways(program: ProgramProfile, index: int) -> tuple[Way, ...]:
    node = program.nodes[index]
    assert node.keep_bytes is not None
    ways = [Way(num_bytes=node.keep_bytes, ticks=0, narrowed=False)]
    if node.narrow_bytes is not None and node.narrow_bytes < node.keep_bytes:
        ways.append(Way(num_bytes=node.narrow_bytes, ticks=_ticks(node.narrow_seconds), narrowed=True))
    return tuple(ways)


def _group(program: ProgramProfile, runnable: Iterable[bool], forced: frozenset[int]) -> list[Group]:
    """One group per op worth running, those that only serve one other group merged into it."""
    nodes = program.nodes
    groups: list[Group] = []
    of_op: dict[int, int] = {}
    can_run = list(runnable)
    readers: list[set[int]] = [set() for _ in program.ops]  # ops that read an unsaved output, by producer
    for number, op in enumerate(program.ops):
        for node in op.inputs:
            producer = nodes[node].producer
            if producer is not None and nodes[node].num_saved == 0 and can_run[number]:
                readers[producer].add(number)
    for number in range(len(program.ops) - 1, -1, -1):
        op = program.ops[number]
        if not can_run[number]:
            continue
        drops = [node for node in op.outputs if nodes[node].num_saved and node not in forced]
        users = {of_op[reader] for reader in readers[number] if reader in of_op}
        if not drops and not users:
            continue
        if not drops and len(users) == 1:
            place = users.pop()
        else:
            place = len(groups)
            groups.append(Group())
            for user in users:
                groups[user].needs.add(place)
        group = groups[place]
        of_op[number] = place
        group.ops.append(number)
        group.ticks += _ticks(op.seconds)
        group.drops += drops
        for node in op.inputs:
            held = nodes[node].kind == "input" and nodes[node].num_saved == 0 and nodes[node].keep_bytes
            if held and node not in group.holds:
                group.holds.append(node)
    return groups


def _ticks(seconds: float) -> int:
    return round(seconds * TICKS)
