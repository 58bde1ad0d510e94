"""What it takes to bring back what a block call returned, so that the next call need not keep its input.

The recipe of an output runs in the frame of the call that returned it: from what its policy keeps, its parameters and,
where its own input is dropped too, from what the call before it returned, and so on. Nothing made on the way stays:
only one call's recipe is at work at a time, and its result enters the next one. So for the input of call j, with the
output recipe of call i under its policy taking t_i seconds and e_i bytes,

    seconds T_j = t_(j-1) + T_(j-1)        bytes E_j = max(e_(j-1), E_(j-1))

where the second terms are there only if the recipe of call j-1 reads that call's own dropped input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memfit.errors import PlanError
from memfit.plans import Policy
from memfit.profiles import ProgramProfile, StepProfile
from memfit.solver.working_set import ops_behind


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """The recipe of an output of one call under a policy.

    Attributes:
        seconds: Time of its ops.
        peak_bytes: Most bytes that it needs beside what is live, its result included, and the call's own linked input
            if it reads that.
        reads_link: Whether it does.
    """

    seconds: float
    peak_bytes: int
    reads_link: bool


def returned(program: ProgramProfile, policy: Policy) -> Returned | None:
    """What bringing ``policy.returned`` back takes; ``None`` if no recipe leads to it, or it is there anyway."""
    output, nodes = policy.returned, program.nodes
    if output is None or output in policy.kept or output in policy.narrowed or nodes[output].kind == "parameter":
        return None
    if output == policy.linked:  # the block returns its linked input
        return Returned(seconds=0.0, peak_bytes=nodes[output].storage_bytes, reads_link=True)
    ops, lacking = ops_behind(program, policy, (output,))
    if lacking:
        return None
    wanted: dict[int, int] = {output: 1}
    for number in ops:
        for node in set(program.ops[number].inputs):
            wanted[node] = wanted.get(node, 0) + 1
    # Narrow leaves are widened before the first op runs, and the linked input is there by then.
    cached = {node for node in wanted if node in policy.narrowed or node == policy.linked}
    current = peak = sum(nodes[node].storage_bytes for node in cached)
    for number in ops:
        op = program.ops[number]
        cached.update(op.outputs)
        current += sum(nodes[node].storage_bytes for node in op.outputs)
        peak = max(peak, current)
        for node in set(op.inputs):
            wanted[node] -= 1
        for node in (*op.inputs, *op.outputs):
            if not wanted.get(node, 0) and node in cached:
                cached.remove(node)
                current -= nodes[node].storage_bytes
    return Returned(
        seconds=sum(program.ops[number].seconds for number in ops),
        peak_bytes=max(peak, nodes[output].storage_bytes),
        reads_link=policy.linked in wanted,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What bringing the linked input of one call back takes, through however many calls.

    Attributes:
        seconds: Time.
        peak_bytes: Most bytes beside what is live, the input itself included.
    """

    seconds: float
    peak_bytes: int


def restored(profile: StepProfile, policies: Sequence[Policy]) -> list[Restored | None]:
    """For every call what bringing its input back takes; ``None`` where it is kept.

    Raises:
        PlanError: A policy drops an input that the call before does not bring back.
    """
    made: dict[Policy, Returned | None] = {}
    found: list[Restored | None] = []
    for place, (call, policy) in enumerate(zip(profile.calls, policies, strict=True)):
        if policy.linked is None:
            found.append(None)
            continue
        before = policies[place - 1] if place else None
        source = None
        if before is not None and call.link is not None:
            if (call.link.input, call.link.output) == (policy.linked, before.returned):
                if before not in made:
                    made[before] = returned(profile.programs[before.program], before)
                source = made[before]
        if source is None:
            raise PlanError(
                f"The plan drops input {policy.linked} of `{call.name}`, which the block call before does not bring "
                "back. Make the plan again with `memfit plan`."
            )
        deeper = found[-1] if source.reads_link else None
        found.append(
            Restored(
                seconds=source.seconds + (deeper.seconds if deeper is not None else 0.0),
                peak_bytes=max(source.peak_bytes, deeper.peak_bytes if deeper is not None else 0),
            )
        )
    return found


def kept_input(policy: Policy) -> Policy:
    """The same policy for a call that is not linked: its input is kept."""
    if policy.linked is None:
        return policy
    return replace(policy, kept=tuple(sorted({*policy.kept, policy.linked})), linked=None)


def settled(profile: StepProfile, policies: Sequence[Policy]) -> list[Policy]:
    """Policies that were made for another step, with every input kept that this step cannot bring back."""
    found: list[Policy] = []
    for place, (call, policy) in enumerate(zip(profile.calls, policies, strict=True)):
        before = found[-1] if place else None
        is_linked = before is not None and call.link is not None and policy.linked is not None
        if is_linked and before is not None and call.link is not None:
            is_linked = (call.link.input, call.link.output) == (policy.linked, before.returned)
            is_linked = is_linked and returned(profile.programs[before.program], before) is not None
        found.append(policy if is_linked else kept_input(policy))
    return found
