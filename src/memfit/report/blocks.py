"""Block calls folded into rows: calls that do the same become one row.

`model.layers.0` to `model.layers.11` with equal bytes become `model.layers.0–11`. Names that differ in several numbers
fold only where every combination is there, so that a row never names a block that does not exist.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        saved_bytes: By all of these calls together.
        recomputed_bytes: By all of these calls together.
        is_child: Whether they are parts of a block that was split.
    """

    name: str
    num_calls: int
    mode: str
    reason: str
    saved_bytes: int
    recomputed_bytes: int
    is_child: bool


def fold(blocks: Iterable[Mapping[str, Any]]) -> list[BlockRow]:
    """Fold equal block calls, in the order in which each kind first appears."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for block in blocks:
        name = str(block["name"])
        key = (
            _NUMBER.sub("*", name),
            str(block.get("mode") or ""),
            str(block.get("reason") or ""),
            int(block.get("saved_bytes") or 0),
            int(block.get("recomputed_bytes") or 0),
            block.get("parent") is not None,
        )
        groups.setdefault(key, []).append(name)
    rows: list[BlockRow] = []
    for (_, mode, reason, saved, recomputed, is_child), names in groups.items():
        for label, num_calls in _labels(names):
            rows.append(
                BlockRow(
                    name=label,
                    num_calls=num_calls,
                    mode=str(mode),
                    reason=str(reason),
                    saved_bytes=int(str(saved)) * num_calls,
                    recomputed_bytes=int(str(recomputed)) * num_calls,
                    is_child=bool(is_child),
                )
            )
    return rows


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
