"""The working set of a block's backward pass under a policy, walked in plain Python.

The timeline of a program says when gradients and temporaries come and go and when autograd asks for a saved tensor; it
is the same for every policy. What the policy adds is replayed here as the runtime does it:

- The recipes of all dropped saved tensors together are a set of ops. Each runs once, and late: when a saved tensor is
  unpacked that is not there, the ops that lead to it and have not run yet do so, in program order.
- Every output of an op that ran is cached until nothing will read it any more: no recipe op that has not run, no saved
  tensor that has not been unpacked. What was unpacked stays until autograd releases it.
- What was kept stays until autograd releases it and no recipe reads it any more.
- What was kept in narrow form holds its narrow bytes that long, and its full bytes from its first use on.
- A linked input comes back through the block call before when the first closure that reads it is about to run, and is
  cached like any other node from then on. What that needs beside what is live is `links.Returned`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memfit.errors import PlanError
from memfit.plans import Policy
from memfit.profiles import ProgramProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkingSet:
    """What the backward pass of one block call needs under a policy.

    Attributes:
        kept_bytes: What the call's frame holds from its forward to its backward pass.
        peak_bytes: Most bytes at once during the backward pass, ``kept_bytes`` that are still held included.
        recompute_seconds: Time of the ops that run again, and of narrowing.
        recomputed_ops: Indices of the ops that run again, ascending.
        link_bytes: Bytes that are there when a linked input begins to come back; ``None``: none ever does.
            ``peak_bytes`` and ``recompute_seconds`` are without what the block calls before it need for that.
    """

    kept_bytes: int
    peak_bytes: int
    recompute_seconds: float
    recomputed_ops: tuple[int, ...]
    link_bytes: int | None = None


def kept_bytes(program: ProgramProfile, policy: Policy) -> int:
    """What the frame of a call of ``program`` holds under ``policy`` from its forward to its backward pass."""
    total = 0
    for index in policy.kept:
        total += _cost(program, index, program.nodes[index].keep_bytes)
    for index in policy.narrowed:
        total += _cost(program, index, program.nodes[index].narrow_bytes)
    return total


def recipe_ops(program: ProgramProfile, policy: Policy) -> tuple[int, ...]:
    """The ops that run again so that every saved tensor is there, ascending.

    Raises:
        PlanError: A saved tensor is neither kept nor can ops bring it back from what is.
    """
    found, lacking = ops_behind(program, policy, program.saved)
    if lacking:
        raise PlanError(
            f"A policy for program `{program.key[:40]}` drops node {min(lacking)}, which no recipe brings back. "
            "Make the plan again with `memfit plan`."
        )
    return found


def ops_behind(program: ProgramProfile, policy: Policy, nodes: Iterable[int]) -> tuple[tuple[int, ...], set[int]]:
    """The ops that bring ``nodes`` back from what a policy leaves there, ascending; and the nodes that none does."""
    there = {node for node, each in enumerate(program.nodes) if each.kind == "parameter"}
    there.update(policy.kept, policy.narrowed, () if policy.linked is None else (policy.linked,))
    needed = set(nodes) - there
    found: list[int] = []
    # Against program order: what an op reads was made by ops before it, so one sweep finds the whole closure.
    for number in range(len(program.ops) - 1, -1, -1):
        op = program.ops[number]
        if not op.recomputable or needed.isdisjoint(op.outputs):
            continue
        found.append(number)
        needed.difference_update(op.outputs)
        needed.update(node for node in op.inputs if node not in there)
    return tuple(reversed(found)), needed


def working_set(program: ProgramProfile, policy: Policy) -> WorkingSet:
    """Walk the backward pass of a block call under a policy.

    Args:
        program: What the block's program costs; its timeline is walked.
        policy: Which nodes are kept; everything else that autograd saves is recomputed.

    Returns:
        Peak in bytes and time in seconds.

    Raises:
        PlanError: A saved tensor is neither kept nor can ops bring it back from what is.
    """
    ops = recipe_ops(program, policy)
    held = kept_bytes(program, policy)
    seconds = sum(program.ops[number].seconds for number in ops)
    seconds += sum(program.nodes[node].narrow_seconds for node in policy.narrowed)
    walk = _Walk(program, policy, ops, held)
    for event in program.timeline:
        if event.kind == "alloc":
            walk.grow(event.size)
        elif event.kind == "free":
            walk.current -= event.size
        elif event.kind == "unpack":
            walk.unpack(event.index)
        else:
            walk.release(event.index)
    return WorkingSet(
        kept_bytes=held,
        peak_bytes=walk.peak,
        recompute_seconds=seconds,
        recomputed_ops=ops,
        link_bytes=walk.link_bytes,
    )


class _Walk:
    """The bytes that a backward pass holds, from one timeline event to the next."""

    def __init__(self, program: ProgramProfile, policy: Policy, ops: tuple[int, ...], held: int) -> None:
        self.program = program
        self.current = held
        self.peak = held
        self.pending = set(ops)
        # What frames hold from the forward pass, by node; and what is there beside it: recomputed or widened, by node.
        self.frame = {node: program.nodes[node].keep_bytes or 0 for node in policy.kept}
        self.frame.update({node: program.nodes[node].narrow_bytes or 0 for node in policy.narrowed})
        self.narrowed = set(policy.narrowed)
        self.linked = policy.linked
        self.link_bytes: int | None = None
        self.cached: set[int] = set()
        # How often a node will still be wanted: by recipe ops that have not run, by saved tensors not yet unpacked; and
        # how many of its saved tensors autograd has not released.
        self.wanted: dict[int, int] = {}
        self.unreleased: dict[int, int] = {}
        for number in ops:
            for node in set(program.ops[number].inputs):
                self.wanted[node] = self.wanted.get(node, 0) + 1
        for node in program.saved:
            self.wanted[node] = self.wanted.get(node, 0) + 1
            self.unreleased[node] = self.unreleased.get(node, 0) + 1
        self.out: dict[int, int] = {}
        self.unpacked = [False] * len(program.saved)
        self.released = [False] * len(program.saved)
        for node in list(self.frame):
            self.settle(node)  # an input that no recipe reads is not held at all

    def grow(self, size: int) -> None:
        self.current += size
        self.peak = max(self.peak, self.current)

    def unpack(self, index: int) -> None:
        if self.released[index]:
            return
        node = self.program.saved[index]
        self.ensure(node)
        if not self.unpacked[index]:
            self.unpacked[index] = True
            self.wanted[node] -= 1
            self.out[node] = self.out.get(node, 0) + 1

    def release(self, index: int) -> None:
        if self.released[index]:
            return
        self.released[index] = True
        node = self.program.saved[index]
        self.unreleased[node] -= 1
        if self.unpacked[index]:
            self.out[node] -= 1
        else:
            self.wanted[node] -= 1
        self.settle(node)

    def ensure(self, node: int) -> None:
        """Have ``node`` there in full."""
        if node in self.cached:
            return
        if node in self.frame:
            if node in self.narrowed:
                self.cache(node)
            return
        if node == self.linked:
            self.link_bytes = max(self.current, self.link_bytes or 0)
            self.cache(node)
            return
        closure = self.closure(node)
        if self.linked is not None and any(self.linked in self.program.ops[number].inputs for number in closure):
            self.ensure(self.linked)  # before anything of this closure runs
        for number in closure:
            op = self.program.ops[number]
            for source in op.inputs:
                if source in self.narrowed:
                    self.ensure(source)
            for output in op.outputs:
                self.cache(output)
            self.pending.discard(number)
            for source in set(op.inputs):
                self.wanted[source] -= 1
                self.settle(source)
            for output in op.outputs:
                if output in self.frame and output not in self.narrowed:
                    self.uncache(output)  # held already: the second copy goes at once
                self.settle(output)

    def closure(self, node: int) -> list[int]:
        """The ops that lead to ``node`` and have not run yet, in program order."""
        found: set[int] = set()
        stack = [node]
        while stack:
            producer = self.program.nodes[stack.pop()].producer
            if producer is None or producer not in self.pending or producer in found:
                continue
            found.add(producer)
            stack.extend(n for n in self.program.ops[producer].inputs if n not in self.frame and n not in self.cached)
        return sorted(found)

    def cache(self, node: int) -> None:
        if node not in self.cached:
            self.cached.add(node)
            self.grow(self.program.nodes[node].storage_bytes)

    def uncache(self, node: int) -> None:
        if node in self.cached:
            self.cached.remove(node)
            self.current -= self.program.nodes[node].storage_bytes

    def settle(self, node: int) -> None:
        """Free what nothing will read any more."""
        if self.wanted.get(node, 0):
            return
        if not self.out.get(node, 0):
            self.uncache(node)
        if node in self.frame and not self.unreleased.get(node, 0):
            self.current -= self.frame.pop(node)


def _cost(program: ProgramProfile, index: int, size: int | None) -> int:
    if size is None:
        raise PlanError(
            f"A policy for program `{program.key[:40]}` keeps node {index}, which cannot be kept that way. "
            "Make the plan again with `memfit plan`."
        )
    return size
