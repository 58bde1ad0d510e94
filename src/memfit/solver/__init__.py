"""Planning: which tensors to save so that a step fits the budget, fastest first. No torch here."""

from __future__ import annotations

from memfit.solver.bound import overhead_bound
from memfit.solver.frontier import Option, block_options
from memfit.solver.peak import Simulation, simulate
from memfit.solver.planner import make_plan, solve, switched
from memfit.solver.special import full_policy, plain_policy, selective_policy
from memfit.solver.working_set import WorkingSet, working_set

__all__ = [
    "Option",
    "Simulation",
    "WorkingSet",
    "block_options",
    "full_policy",
    "make_plan",
    "overhead_bound",
    "plain_policy",
    "selective_policy",
    "simulate",
    "solve",
    "switched",
    "working_set",
]
