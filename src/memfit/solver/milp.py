"""Linear and integer programs for HiGHS, solved on one thread so that equal inputs give equal answers.

Callers scale their numbers, bytes by `byte_unit` and seconds to microseconds: times in seconds would sit at HiGHS's
tolerances.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import highspy
import numpy as np

MICROSECOND = 1e-6


def byte_unit(largest: int) -> float:
    """Bytes to count in where ``largest`` is the largest number of bytes: at 2^20 of them, 1e-6 is still exact."""
    return max(1.0, largest / 2**20)


@dataclass(slots=True, kw_only=True)
class Program:
    """Minimise ``costs @ x`` with ``lower <= x <= upper`` and ``row_lower <= rows @ x <= row_upper``."""

    costs: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    row_lower: list[float] = field(default_factory=list)
    row_upper: list[float] = field(default_factory=list)
    rows: list[dict[int, float]] = field(default_factory=list)

    def variable(self, cost: float, *, lower: float = 0.0, upper: float = 1.0, integer: bool = False) -> int:
        """Add a variable; returns its index."""
        self.costs.append(cost)
        self.lower.append(lower)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.costs) - 1

    def row(
        self, terms: dict[int, float], *, lower: float = -highspy.kHighsInf, upper: float = highspy.kHighsInf
    ) -> int:
        """Add a row; returns its index."""
        self.rows.append(terms)
        self.row_lower.append(lower)
        self.row_upper.append(upper)
        return len(self.rows) - 1


class Solver:
    """HiGHS with one program loaded, to be solved with several right-hand sides."""

    def __init__(self, program: Program, *, gap: float = 0.0, max_nodes: int | None = None) -> None:
        self.highs = highspy.Highs()
        for name, value in (("output_flag", False), ("threads", 1), ("mip_rel_gap", gap), ("mip_abs_gap", 1e-6)):
            self.highs.setOptionValue(name, value)
        if max_nodes is not None:
            self.highs.setOptionValue("mip_max_nodes", max_nodes)
        model = highspy.HighsLp()
        model.num_col_ = len(program.costs)
        model.num_row_ = len(program.rows)
        model.col_cost_ = np.array(program.costs, dtype=np.float64)
        model.col_lower_ = np.array(program.lower, dtype=np.float64)
        model.col_upper_ = np.array(program.upper, dtype=np.float64)
        model.row_lower_ = np.array(program.row_lower, dtype=np.float64)
        model.row_upper_ = np.array(program.row_upper, dtype=np.float64)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.cumsum([0] + [len(row) for row in program.rows], dtype=np.int32)
        model.a_matrix_.index_ = np.array([column for row in program.rows for column in row], dtype=np.int32)
        model.a_matrix_.value_ = np.array([value for row in program.rows for value in row.values()], dtype=np.float64)
        if any(program.integer):
            kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
            model.integrality_ = [kinds[integer] for integer in program.integer]
        self.highs.passModel(model)

    def limit(self, row: int, upper: float) -> None:
        """Set the upper limit of a row that has no lower one."""
        self.highs.changeRowBounds(row, -highspy.kHighsInf, upper)

    def solve(self) -> list[float] | None:
        """The best point found, or ``None`` if there is none."""
        self.highs.run()
        solution = self.highs.getSolution()
        if self.highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible or not solution.value_valid:
            return None
        return list(solution.col_value)
