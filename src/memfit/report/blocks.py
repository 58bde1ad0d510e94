"""Block calls folded into rows: calls that do the same become one row.

`model.layers.0` to `model.layers.11` with equal bytes become `model.layers.0–11`. Names that differ in several numbers
fold only where every combination is there, so that a row never names a block that does not exist.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRow:
    """Block calls that do the same.

    Attributes:
        name: Their names, numbers folded into ranges.
        num_calls: Calls in one step.
        mode: ``replay``, ``descent``, ``fallback`` or ``plain``.
        reason: Why not ``replay``; empty where there is nothing to say.
        saved_bytes: By all of these calls together; ``None`` where it was not measured.
        recomputed_bytes: By all of these calls together; ``None`` where it was not measured.
        is_child: Whether they are parts of a block that was split.
    """

    name: str
    num_calls: int
    mode: str
    reason: str
    saved_bytes: int | None
    recomputed_bytes: int | None
    is_child: bool


def fold(blocks: Iterable[Mapping[str, Any]]) -> list[BlockRow]:
    """Fold equal block calls, in the order in which each kind first appears."""
    groups: dict[BlockRow, list[str]] = {}
    for block in blocks:
        name = str(block["name"])
        # One call of its kind, numbers left out: calls that agree in all of this share a row.
        kind = BlockRow(
            name=_NUMBER.sub("*", name),
            num_calls=1,
            mode=str(block.get("mode") or ""),
            reason=str(block.get("reason") or ""),
            saved_bytes=block.get("saved_bytes"),
            recomputed_bytes=block.get("recomputed_bytes"),
            is_child=bool(block.get("parent")),
        )
        groups.setdefault(kind, []).append(name)
    return [
        replace(
            kind,
            name=label,
            num_calls=num_calls,
            saved_bytes=None if kind.saved_bytes is None else kind.saved_bytes * num_calls,
            recomputed_bytes=None if kind.recomputed_bytes is None else kind.recomputed_bytes * num_calls,
        )
        for kind, names in groups.items()
        for label, num_calls in _labels(names)
    ]


def _labels(names: Sequence[str]) -> list[tuple[str, int]]:
    """Labels that cover names of one pattern exactly, each with its number of calls."""
    numbers = [tuple(int(match) for match in _NUMBER.findall(name)) for name in names]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if math.prod(len(column) for column in columns) == len(set(numbers)):
        ranges = iter([_ranges(column) for column in columns])
        return [(_NUMBER.sub(lambda _: next(ranges), names[0]), len(names))]
    first = next(index for index, column in enumerate(columns) if len(column) > 1)
    labels: list[tuple[str, int]] = []
    for value in columns[first]:
        labels += _labels([name for name, key in zip(names, numbers, strict=True) if key[first] == value])
    return labels


def _ranges(values: Sequence[int]) -> str:
    """Ascending numbers as ranges: ``0–3,5,7–9``."""
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(values)) if b != a + 1), len(values)]
    spans = [(values[start], values[stop - 1]) for start, stop in pairwise(cuts)]
    return ",".join(str(low) if low == high else f"{low}–{high}" for low, high in spans)
