"""Steps whose lifetimes cross, as integer programs: one row per event.

A U-Net's frames may outlive those that were opened before them, and so may those of several backward passes. Then no
prefix describes what is live, and HiGHS decides instead of the dynamic program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memfit.profiles import StepProfile
from memfit.solver.frontier import Option
from memfit.solver.lifetimes import fixed_bytes, own_call
from memfit.solver.milp import MICROSECOND, Program, Solver, byte_unit
from memfit.solver.peak import event_bytes

_ATTEMPTS = 8
_GAP = 5e-4
_MAX_NODES = 500
"""Equal blocks are interchangeable, and HiGHS would prove the last 0.1% one permutation at a time."""


class Crossed:
    """A step as an integer program: one binary per call and option, time or peak as the objective.

    Args:
        profile: The step.
        options: Of each call.
    """

    def __init__(self, profile: StepProfile, options: Sequence[Sequence[Option]]) -> None:
        self.profile = profile
        self.options = options
        sizes = [fixed_bytes(profile, event) for event in profile.events]
        sizes += [each.kept_bytes + each.working_bytes for choices in options for each in choices]
        self._smallest: list[int] | None = None
        self.unit = byte_unit(max(sizes, default=1))

    def fastest(self, budget: int) -> list[int] | None:
        """The option of each call that take least time together, to 0.05%; ``None`` if nothing fits the budget."""
        limit = budget
        for _ in range(_ATTEMPTS):
            program, columns = self._program(timed=True, peak=limit)
            picked = self._solve(program, columns)
            if picked is None:
                break
            over = self.peak(picked) - budget
            if over <= 0:
                return picked
            limit -= over  # rounding of nearly integer values: ask for that much less
        smallest = self.smallest()
        return smallest if self.peak(smallest) <= budget else None

    def smallest(self) -> list[int]:
        """The option of each call with the lowest peak."""
        if self._smallest is None:
            greedy = [[_least(choices, size) for choices in self.options] for size in (_kept, _working)]
            program, columns = self._program(timed=False, peak=None)
            picked = self._solve(program, columns)
            self._smallest = min(greedy if picked is None else [picked, *greedy], key=self.peak)
        return self._smallest

    def peak(self, picked: Sequence[int]) -> int:
        """The peak of these options, in bytes; exact."""
        chosen = [choices[number] for choices, number in zip(self.options, picked, strict=True)]
        kept, working = [each.kept_bytes for each in chosen], [each.working_bytes for each in chosen]
        return max((event_bytes(self.profile, event, kept, working) for event in self.profile.events), default=0)

    def _program(self, *, timed: bool, peak: int | None) -> tuple[Program, list[list[int]]]:
        program = Program()
        columns = [
            [program.variable(each.recompute_seconds / MICROSECOND if timed else 0.0, integer=True) for each in choices]
            for choices in self.options
        ]
        for row in columns:
            program.row(dict.fromkeys(row, 1.0), lower=1.0, upper=1.0)
        top = None if timed else program.variable(1.0, upper=float("inf"))
        for event in self.profile.events:
            terms: dict[int, float] = {}
            for call in event.live_calls:
                for each, column in zip(self.options[call], columns[call], strict=True):
                    terms[column] = terms.get(column, 0.0) + each.kept_bytes / self.unit
            own = own_call(event)
            if own is not None:
                for each, column in zip(self.options[own], columns[own], strict=True):
                    terms[column] = terms.get(column, 0.0) + each.working_bytes / self.unit
            fixed = fixed_bytes(self.profile, event) / self.unit
            if top is not None:
                program.row({**terms, top: -1.0}, upper=-fixed)
            elif peak is not None:
                program.row(terms, upper=peak / self.unit - fixed)
        return program, columns

    def _solve(self, program: Program, columns: list[list[int]]) -> list[int] | None:
        values = Solver(program, gap=_GAP, max_nodes=_MAX_NODES).solve()
        if values is None:
            return None
        return [max(range(len(row)), key=lambda number: values[row[number]]) for row in columns]


def _least(choices: Sequence[Option], size: Callable[[Option], tuple[int, int]]) -> int:
    return min(range(len(choices)), key=lambda number: size(choices[number]))


def _kept(each: Option) -> tuple[int, int]:
    return each.kept_bytes, each.working_bytes


def _working(each: Option) -> tuple[int, int]:
    return each.working_bytes, each.kept_bytes
