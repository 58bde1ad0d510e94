"""Seeded random policies: any subset that recipes can start from must give the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Set

from memfit.plans import Policy
from memfit.profiles import ProgramProfile
from memfit.solver import full_policy


def random_policy(seed: int, *, keep: float = 0.4) -> Callable[[ProgramProfile], Policy]:
    """A function that keeps each saved node with probability ``keep``, and beyond that only what recipes need.

    Equal seeds and programs give equal policies, whatever ran before. Half of what has a narrow form is kept in it.
    """

    def policy(program: ProgramProfile) -> Policy:
        draw = random.Random(f"{seed} {program.key}")
        kept = {n for n, node in enumerate(program.nodes) if node.must_keep}
        kept |= {n for n in candidates(program) if draw.random() < keep}
        saved = sorted(set(program.saved))
        draw.shuffle(saved)
        while lacking := [n for n in saved if n not in available(program, kept)]:
            kept.add(keepable_ancestor(program, lacking[0], available(program, kept)))
        narrowed = {n for n in sorted(kept) if program.nodes[n].narrow_bytes is not None and draw.random() < 0.5}
        return Policy(program=program.key, kept=tuple(sorted(kept - narrowed)), narrowed=tuple(sorted(narrowed)))

    return policy


def keep_everything(program: ProgramProfile) -> Policy:
    """Drop nothing that autograd saves."""
    kept = {n for n in program.saved if program.nodes[n].kind != "parameter"}
    return Policy(program=program.key, kept=tuple(sorted(kept)))


def candidates(program: ProgramProfile) -> list[int]:
    """Nodes that a policy may keep."""
    return [
        n
        for n, node in enumerate(program.nodes)
        if node.keep_bytes is not None and (node.num_saved > 0 or node.kind == "input")
    ]


def available(program: ProgramProfile, kept: Set[int]) -> set[int]:
    """Nodes that are there in the backward, or that recipes bring back from those that are."""
    there = {n for n, node in enumerate(program.nodes) if n in kept or node.kind == "parameter"}
    for op in program.ops:
        if op.recomputable and there.issuperset(op.inputs):
            there.update(op.outputs)
    return there


def keepable_ancestor(program: ProgramProfile, n: int, there: Set[int]) -> int:
    """Node ``n`` if it can be kept, else the first of what it is made from that is not there and can be kept."""
    may_keep = set(candidates(program))
    queue, seen = [n], {n}
    for node in queue:
        if node in may_keep:
            return node
        producer = program.nodes[node].producer
        sources = () if producer is None else program.ops[producer].inputs
        queue += [source for source in sources if source not in there and source not in seen]
        seen.update(sources)
    raise AssertionError(f"node {n} of {program.key} can be neither kept nor brought back")


def link_everything(program: ProgramProfile) -> Policy:
    """Full activation checkpointing, and every block whose input is what the block before returned drops that too.

    Where a call turns out not to be linked, its input is kept: of a row of blocks that of the first one.
    """
    policy = full_policy(program)
    inputs = [n for n, node in enumerate(program.nodes) if node.kind == "input" and node.keep_bytes]
    linked = inputs[0] if inputs else None
    kept = tuple(n for n in policy.kept if n != linked)
    returned = program.outputs[0] if program.outputs else None
    return Policy(program=program.key, kept=kept, linked=linked, returned=returned)
