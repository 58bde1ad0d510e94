"""The fastest options along a chain of block calls, by dynamic programming over kept bytes.

State: the bytes that the first calls hold. They are binned on a grid, and every cell carries the exact bytes of the
fastest way to reach it, so no rounding adds up over the calls and a plan that comes out fits in truth; two ways that
end in one cell are told apart by time only, which makes the result exact up to one cell at each call.

The grid spans what matters: from the fewest bytes that the first i calls can hold to the most from which the rest still
fits. Every state on it can be completed, so a budget that is feasible is never lost, and at the tightest budgets a cell
is one byte.

Source:
    Beaumont et al. 2019, hal-02352969, for the chain. Differs: the options of a block come from its own frontier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memfit.solver.choices import TICKS
from memfit.solver.frontier import Option
from memfit.solver.lifetimes import Chain

CELLS = 4096
_NEVER = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where the kept bytes of the first i calls may lie, i from 0 to all calls.

    Attributes:
        low: The fewest that they can hold.
        high: The most from which the rest still fits.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]


def room(chain: Chain, options: Sequence[Sequence[Option]], budget: int) -> Room | None:
    """The room that a budget leaves; ``None`` if nothing fits.

    Holding fewer bytes never hurts a later call, so the fewest are reached greedily.

    Args:
        chain: The calls.
        options: Of each call, in the chain's order.
        budget: In bytes.
    """
    low = [0]
    for place, choices in enumerate(options):
        if not _fits(low[-1], chain.need[place], budget):
            return None
        allowed = [each.kept_bytes for each in choices if low[-1] <= _limit(chain, place, each, budget)]
        if not allowed:
            return None
        low.append(low[-1] + min(allowed))
    if not _fits(low[-1], chain.need[-1], budget):
        return None
    most = _NEVER if chain.need[-1] is None else budget - chain.need[-1]
    high = [min(most, sum(max(each.kept_bytes for each in choices) for choices in options))]
    for place in range(len(options) - 1, -1, -1):
        most = max(min(_limit(chain, place, each, budget), high[-1] - each.kept_bytes) for each in options[place])
        need = chain.need[place]
        high.append(most if need is None else min(most, budget - need))
    return Room(low=tuple(low), high=tuple(reversed(high)))


def smallest_budget(chain: Chain, options: Sequence[Sequence[Option]]) -> int:
    """The smallest budget that leaves room, in bytes; exact."""
    needs = [need for need in (*chain.need, *chain.own_need) if need is not None]
    most = sum(max(each.kept_bytes + each.working_bytes for each in choices) for choices in options)
    low, high = -1, max(needs, default=0) + most
    while high - low > 1:
        middle = (low + high) // 2
        if room(chain, options, middle) is None:
            low = middle
        else:
            high = middle
    return high


def fastest(chain: Chain, options: Sequence[Sequence[Option]], budget: int, *, cells: int = CELLS) -> list[int] | None:
    """The option of each call, in the chain's order, that take least time together under a budget.

    Args:
        chain: The calls.
        options: Of each call, in the chain's order.
        budget: In bytes.
        cells: Size of the grid.

    Returns:
        ``None`` if nothing fits.
    """
    span = room(chain, options, budget)
    if span is None:
        return None
    width = max(1, -(-(max(h - low for h, low in zip(span.high, span.low, strict=True)) + 1) // cells))
    # Per cell: the bytes above `low` within the cell, and the time of the fastest way there.
    rest = np.zeros(1, dtype=np.int64)
    ticks = np.zeros(1, dtype=np.int64)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for place, choices in enumerate(options):
        above = span.high[place + 1] - span.low[place + 1]
        size = min(above // width + 1, cells)
        next_rest = np.zeros(size, dtype=np.int64)
        next_ticks = np.full(size, _NEVER, dtype=np.int64)
        chosen = np.full(size, -1, dtype=np.int16)
        source = np.zeros(size, dtype=np.int32)
        for number, each in enumerate(choices):
            grow = each.kept_bytes - (span.low[place + 1] - span.low[place])
            limit = min(_limit(chain, place, each, budget) - span.low[place], above - grow)
            count = min(limit // width + 1, len(rest))
            if limit < 0 or count < 1:
                continue
            if (count - 1) * width + int(rest[count - 1]) > limit:
                count -= 1
            shift, extra = divmod(grow, width)
            there = ticks[:count] + round(each.recompute_seconds * TICKS)
            within = rest[:count] + extra
            carried = within >= width
            for carry in (0, 1) if extra else (0,):
                usable = carried if carry else ~carried
                start = shift + carry
                end = min(start + count, size)
                if end <= start:
                    continue
                part = end - start
                better = usable[:part] & (there[:part] < next_ticks[start:end])
                cells_from = np.flatnonzero(better)
                if not len(cells_from):
                    continue
                cells_to = cells_from + start
                next_ticks[cells_to] = there[cells_from]
                next_rest[cells_to] = within[cells_from] - carry * width
                chosen[cells_to] = number
                source[cells_to] = cells_from
        rest, ticks = next_rest, next_ticks
        trail.append((chosen, source))
    cell = int(ticks.argmin())
    if ticks[cell] >= _NEVER:
        return None
    picked = []
    for chosen, source in reversed(trail):
        picked.append(int(chosen[cell]))
        cell = int(source[cell])
    return picked[::-1]


def _limit(chain: Chain, place: int, each: Option, budget: int) -> int:
    """The most bytes that the calls before ``place`` may hold with this option there."""
    own = chain.own_need[place]
    return _NEVER if own is None else budget - own - each.working_bytes


def _fits(kept: int, need: int | None, budget: int) -> bool:
    return need is None or kept + need <= budget
