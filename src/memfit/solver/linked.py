"""A chain of block calls whose inputs may be dropped too: dynamic programming with the links between them.

In `chain` the one state is the bytes that the first calls hold. A dropped input adds a number: how often an output will
be brought back. If call j drops its input, the output of call j-1 comes back once for j's own backward pass,
and again each time that j's output comes back through j's dropped input. So with c_j for call j's output,

    c_(j-1) = 0 if j keeps its input, else 1 + (c_j if j's output recipe reads that input, else 0)

and call j costs its own recomputation and c_j times its output recipe. Going forward, c_j is guessed when j is placed
and checked when j+1 is. Everything else is as in `chain`: bytes on a grid that carries exact bytes, per state.

Seconds are exact up to the grid. Bytes are exact or too many, never too few: each call that drops its input is charged
the dearest way to bring it back among the options of the calls before it, in place of the one that is picked.

A row of dropped inputs is at most `DEPTH` long. There each block keeps 1/9 of its input on average and runs forward 4
more times; the next halving of what is left would double that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memfit.plans import Policy
from memfit.profiles import Link, StepProfile
from memfit.solver.choices import TICKS
from memfit.solver.frontier import Option
from memfit.solver.lifetimes import Chain, Nested
from memfit.solver.variants import Variant, Variants

DEPTH = 8
CELLS = 512
_NEVER = 2**62
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """One variant of a call, for all counts c that it goes with.

    Attributes:
        variant: Its number.
        before: Counts of the call before, as a range; one count may go with several of this call.
        after: Counts of this call.
        ticks: Time, for each of ``after``.
        kept: Bytes.
        working: Bytes at its backward pass.
    """

    variant: int
    before: tuple[int, int]
    after: tuple[int, int]
    ticks: Integers
    kept: int
    working: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """What one call of the chain may do."""

    variants: list[Variant]
    moves: list[_Move]
    froms: Integers
    tos: Integers
    kept: Integers
    working: Integers


class LinkedChain:
    """A chain, with the links in it.

    Args:
        profile: The step.
        chain: Of calls of the step.
        variants: Of its programs.
    """

    def __init__(self, profile: StepProfile, chain: Chain, variants: Variants) -> None:
        self.chain = chain
        links = [self._link(profile, place) for place in range(len(chain.calls))]
        self.places: list[_Place] = []
        known: dict[tuple[object, ...], _Place] = {}
        dearest = 0
        for place, call in enumerate(chain.calls):
            link = links[place]
            after = links[place + 1] if place + 1 < len(links) else None
            key = (
                profile.calls[call].program,
                link.input if link is not None else None,
                after.output if after is not None else None,
                dearest,
            )
            if key not in known:
                known[key] = _place(variants.of(key[0], key[1], key[2]), dearest)
            self.places.append(known[key])
            outputs = [each.output.peak_bytes for each in known[key].variants if each.output is not None]
            dearest = max([dearest if link is not None else 0, *outputs])

    def _link(self, profile: StepProfile, place: int) -> Link | None:
        """The link of a call, if the call before it lives whenever it does."""
        calls = self.chain.calls
        if place == 0 or calls[place - 1] != calls[place] - 1:
            return None
        return profile.calls[calls[place]].link

    def lows(self, budget: int) -> list[Integers] | None:
        """The fewest bytes that the first i calls can hold, for every count; ``None`` if nothing fits."""
        low = np.full(DEPTH + 1, _NEVER, dtype=np.int64)
        low[0] = 0
        found = [low]
        for number, place in enumerate(self.places):
            if not _fits(int(low.min()), self.chain.need[number], budget):
                return None
            own = self.chain.own_need[number]
            start = low[place.froms]
            usable = start < _NEVER
            if own is not None:
                usable &= start + place.working <= budget - own
            low = np.full(DEPTH + 1, _NEVER, dtype=np.int64)
            np.minimum.at(low, place.tos[usable], (start + place.kept)[usable])
            need = self.chain.need[number + 1]
            if need is not None:
                low[low + need > budget] = _NEVER
            if low.min() >= _NEVER:
                return None
            found.append(low)
        return found if found[-1][0] < _NEVER else None

    def smallest_budget(self, most: int) -> int:
        """The smallest budget that leaves room, given one that does."""
        low, high = -1, most
        while high - low > 1:
            middle = (low + high) // 2
            if self.lows(middle) is None:
                low = middle
            else:
                high = middle
        return high

    def highs(self, budget: int) -> list[Integers]:
        """The most bytes that the first i calls may hold, for every count, such that the rest still fits."""
        need = self.chain.need[-1]
        high = np.full(DEPTH + 1, -1, dtype=np.int64)
        most = sum(int(place.kept.max()) for place in self.places)
        high[0] = most if need is None else min(most, budget - need)
        found = [high]
        for number in range(len(self.places) - 1, -1, -1):
            place = self.places[number]
            own, need = self.chain.own_need[number], self.chain.need[number]
            end = np.where(found[-1][place.tos] < 0, -1, found[-1][place.tos] - place.kept)
            if own is not None:
                end = np.minimum(end, budget - own - place.working)
            high = np.full(DEPTH + 1, -1, dtype=np.int64)
            np.maximum.at(high, place.froms, end)
            if need is not None:
                high = np.minimum(high, budget - need)
            found.append(np.maximum(high, -1))
        return found[::-1]

    def fastest(self, budget: int, *, cells: int = CELLS) -> list[Policy] | None:
        """The policy of each call, in the chain's order, that take least time together; ``None`` if nothing fits."""
        lows = self.lows(budget)
        if lows is None:
            return None
        highs = self.highs(budget)
        base = [int(low.min()) for low in lows]
        width = max(1, -(-(max(int(h.max()) - low for h, low in zip(highs, base, strict=True)) + 1) // cells))
        rest = np.zeros((DEPTH + 1, 1), dtype=np.int64)
        ticks = np.full((DEPTH + 1, 1), _NEVER, dtype=np.int64)
        ticks[0, 0] = 0
        trail = []
        for number, place in enumerate(self.places):
            own = self.chain.own_need[number]
            room = _NEVER if own is None else budget - own - base[number]
            grid = _Grid(highs[number + 1] - base[number + 1], width)
            for move in place.moves:
                grow = move.kept - (base[number + 1] - base[number])
                grid.spread(rest, ticks, move, grow, min(room - move.working, _NEVER))
            rest, ticks = grid.rest, grid.ticks
            trail.append(grid)
        cell = int(ticks[0].argmin())
        if ticks[0, cell] >= _NEVER:
            return None
        row = 0
        picked = []
        for place, grid in zip(reversed(self.places), reversed(trail), strict=True):
            move = place.moves[int(grid.chosen[row, cell])]
            picked.append(place.variants[move.variant].option.policy)
            first, last = move.before
            cell, row = int(grid.source[row, cell]), first if last - first == 1 else first + row - move.after[0]
        return picked[::-1]


class _Grid:
    """Per count and cell of bytes: the fastest way there, and the bytes above the cell's own."""

    def __init__(self, above: Integers, width: int) -> None:
        size = max(int(above.max()) // width + 1, 1)
        self.above = above[:, None]
        self.width = width
        self.size = size
        self.rest = np.zeros((len(above), size), dtype=np.int64)
        self.ticks = np.full((len(above), size), _NEVER, dtype=np.int64)
        self.chosen = np.full((len(above), size), -1, dtype=np.int16)
        self.source = np.zeros((len(above), size), dtype=np.int32)
        self.number = -1

    def spread(self, rest: Integers, ticks: Integers, move: _Move, grow: int, limit: int) -> None:
        """Take one move from every cell that holds at most ``limit`` bytes."""
        self.number += 1
        width = self.width
        count = min(limit // width + 1, rest.shape[1])
        if limit < 0 or count < 1:
            return
        rows = slice(*move.before)
        spent = ticks[rows, :count] + move.ticks[:, None]
        if spent.min() >= _NEVER:
            return
        usable = spent < _NEVER
        usable[:, -1] &= (count - 1) * width + rest[rows, count - 1] <= limit
        shift, extra = divmod(grow, width)
        within = rest[rows, :count] + extra
        carried = within >= width
        for carry in (0, 1) if extra else (0,):
            start = shift + carry
            first, last = max(0, -start), min(count, self.size - start)
            if last <= first:
                continue
            part, to = slice(first, last), slice(start + first, start + last)
            left = within[:, part] - carry * width
            good = usable[:, part] & (carried[:, part] if carry else ~carried[:, part])
            there = slice(*move.after)
            known = self.ticks[there, to]
            good = good & (spent[:, part] < known)
            good &= np.arange(start + first, start + last) * width + left <= self.above[there]
            if not good.any():
                continue
            shape = known.shape
            known[good] = spent[:, part][good]
            self.rest[there, to][good] = np.broadcast_to(left, shape)[good]
            self.chosen[there, to][good] = self.number
            self.source[there, to][good] = np.broadcast_to(np.arange(first, last), shape)[good]


def _place(variants: list[Variant], dearest: int) -> _Place:
    moves: list[_Move] = []
    counts = np.arange(DEPTH + 1, dtype=np.int64)
    for number, each in enumerate(variants):
        policy, output = each.option.policy, each.output
        before, after = (0, 1), (0, 1)
        if policy.linked is not None:
            before = (1, 2)
        if output is not None:
            after = (1, DEPTH + 1)
            if output.reads_link:
                before, after = (2, DEPTH + 1), (1, DEPTH)
        again = round(output.seconds * TICKS) if output is not None else 0
        working = each.option.working_bytes
        if each.link_bytes is not None:
            working = max(working, each.link_bytes + dearest)
        moves.append(
            _Move(
                variant=number,
                before=before,
                after=after,
                ticks=counts[slice(*after)] * again + round(each.option.recompute_seconds * TICKS),
                kept=each.option.kept_bytes,
                working=working,
            )
        )
    froms, tos, kept, working_of = [], [], [], []
    for move in moves:
        for offset, row in enumerate(range(*move.after)):
            froms.append(move.before[0] if move.before[1] - move.before[0] == 1 else move.before[0] + offset)
            tos.append(row)
            kept.append(move.kept)
            working_of.append(move.working)
    return _Place(
        variants=variants,
        moves=moves,
        froms=np.array(froms),
        tos=np.array(tos),
        kept=np.array(kept, dtype=np.int64),
        working=np.array(working_of, dtype=np.int64),
    )


class LinkedSearch:
    """A step as linked chains.

    Args:
        profile: The step.
        options: Of each call.
        step: Its chains.
        most: A budget that all of them fit.
    """

    def __init__(self, profile: StepProfile, options: Sequence[Sequence[Option]], step: Nested, most: int) -> None:
        variants = Variants(
            {call.program: options[number] for number, call in enumerate(profile.calls)}, profile.programs
        )
        self._single = [choices[0].policy for choices in options]
        self._static = step.static_bytes
        self._most = most
        self._chains = [LinkedChain(profile, chain, variants) for chain in step.chains]

    def smallest_peak(self) -> int:
        """The smallest budget that can be met."""
        return max([self._static, *(chain.smallest_budget(self._most) for chain in self._chains)])

    def smallest(self) -> list[Policy]:
        """The policy of each call at that budget; the peak may turn out lower yet."""
        found = self.within(self.smallest_peak())
        assert found is not None, "a budget that leaves room has a plan"
        return found

    def within(self, limit: int) -> list[Policy] | None:
        """The policy of each call that take least time together; ``None`` if nothing fits."""
        picked = list(self._single)
        for chain in self._chains:
            found = chain.fastest(limit)
            if found is None:
                return None
            for call, policy in zip(chain.chain.calls, found, strict=True):
                picked[call] = policy
        return picked


def has_links(profile: StepProfile) -> bool:
    """Whether any call of the step is linked to the one before it."""
    return any(call.link is not None for call in profile.calls)


def _fits(kept: int, need: int | None, budget: int) -> bool:
    return need is None or kept + need <= budget
