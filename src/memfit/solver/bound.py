"""The least time that any plan could add to a step under a budget: what benchmarks print beside a measurement.

Relaxed twice: policies may be mixed in one call (the lower hull of all policies, not only those offered to the solver);
and a working set is only bounded by what is kept and by what autograd holds anyway, as if recomputation needed none
itself. So no plan that keeps block inputs is faster, and the best one may be slower. Under the peaks that such plans
reach, where inputs come back through the blocks before (`links`), there is no bound.
"""

from __future__ import annotations

from itertools import pairwise

from memfit.profiles import ProgramProfile, StepProfile
from memfit.solver.frontier import hull_points
from memfit.solver.lifetimes import fixed_bytes, own_call
from memfit.solver.milp import MICROSECOND, Program, Solver, byte_unit


def overhead_bound(profile: StepProfile, *, budget: int) -> float | None:
    """Seconds that every plan within a budget adds to a step at least; ``None`` if no plan can fit it.

    Args:
        profile: What a training step costs.
        budget: Upper limit on peak memory, in bytes.
    """
    hulls = {key: hull_points(program) for key, program in profile.programs.items()}
    floors = {key: working_floor(program) for key, program in profile.programs.items()}
    unit = byte_unit(budget)
    program = Program()
    kept = []
    for call in profile.calls:
        points = hulls[call.program]
        most, fewest = points[0][0] / unit, points[-1][0] / unit
        kept.append(program.variable(0.0, lower=fewest, upper=most))
        seconds = program.variable(1.0, lower=points[0][1] / MICROSECOND, upper=float("inf"))
        for (bytes_left, time_left), (bytes_right, time_right) in pairwise(points):
            if bytes_left > bytes_right:
                slope = (time_right - time_left) / MICROSECOND / ((bytes_left - bytes_right) / unit)
                at = time_left / MICROSECOND + slope * bytes_left / unit
                program.row({seconds: 1.0, kept[-1]: slope}, lower=at)
    for event in profile.events:
        fixed = fixed_bytes(profile, event)
        terms = {kept[call]: 1.0 for call in event.live_calls}
        own = own_call(event)
        if own is not None:
            program.row(dict(terms), upper=(budget - fixed - floors[profile.calls[own].program]) / unit)
            terms[kept[own]] = 1.0
        program.row(terms, upper=(budget - fixed) / unit)
    values = Solver(program).solve()
    if values is None:
        return None
    return sum(cost * value for cost, value in zip(program.costs, values, strict=True)) * MICROSECOND


def working_floor(program: ProgramProfile) -> int:
    """Bytes that a backward pass needs at once under every policy: temporaries, and what autograd has unpacked."""
    transient = floor = 0
    held: dict[int, set[int]] = {}
    for event in program.timeline:
        if event.kind == "alloc":
            transient += event.size
        elif event.kind == "free":
            transient -= event.size
        else:
            users = held.setdefault(program.saved[event.index], set())
            if event.kind == "unpack":
                users.add(event.index)
            else:
                users.discard(event.index)
        there = 0
        for index, users in held.items():
            node = program.nodes[index]
            if users and node.kind != "parameter":
                there += node.storage_bytes if node.keep_bytes is None else min(node.storage_bytes, node.keep_bytes)
        floor = max(floor, transient + there)
    return floor
