"""Which ops lead to a value from what a policy keeps: the straight-line pieces of a program that recipes are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memfit.errors import MemfitError
from memfit.programs import Program


@dataclass(frozen=True, slots=True)
class OutputRecipe:
    """What brings back one output of a block, for the next block's dropped input.

    Attributes:
        node: The output.
        closure: Ops to run, in program order; none where the output is there anyway.
        leaves: Nodes among inputs and kept values that it reads.
        parameters: Parameters and buffers that it reads.
        uses: Per node: how many of the ops use it; one more for the output.
        reads_link: Whether it reads the block's own dropped input.
    """

    node: int
    closure: tuple[int, ...]
    leaves: tuple[int, ...]
    parameters: tuple[int, ...]
    uses: tuple[int, ...]
    reads_link: bool


def output_recipe(program: Program, node: int | None, available: Mapping[int, str]) -> OutputRecipe | None:
    """The recipe of an output; ``None`` if it is not asked for, or cannot come back: then the next block keeps it.

    Args:
        program: The block's.
        node: The output.
        available: Nodes that are there, and what they are: ``kept``, ``input``, ``link`` or ``parameter``.
    """
    if node is None or not 0 <= node < len(program.nodes) or available.get(node) == "parameter":
        return None
    try:
        ops, read = closure(program, node, available)
    except MemfitError:
        return None
    uses = [0] * len(program.nodes)
    uses[node] = 1
    for number in ops:
        for source in program.ops[number].inputs:
            uses[source] += 1
    return OutputRecipe(
        node=node,
        closure=ops,
        leaves=tuple(n for n in read if available[n] in ("kept", "input")),
        parameters=tuple(n for n in read if available[n] == "parameter"),
        uses=tuple(uses),
        reads_link=any(available[n] == "link" for n in read),
    )


def droppable(program: Program, number: int) -> bool:
    """Whether a recipe may bring a saved node back."""
    node = program.nodes[number]
    if node.leaf is not None:
        return node.leaf.kind == "input"
    return node.recomputable


def closure(program: Program, number: int, available: Mapping[int, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ops that make node ``number`` from available nodes, in program order, and the available nodes that they read.

    Raises:
        MemfitError: There are none.
    """
    wanted, run, read = [number], set(), set()
    while wanted:
        n = wanted.pop()
        if n in available:
            read.add(n)
            continue
        producer = program.nodes[n].producer
        if producer is None or not program.ops[producer].recomputable:
            why = program.nodes[n].reason or "not kept"
            raise MemfitError(f"No recipe leads to node {n} of program {program.key}: {why}. Keep it.")
        if producer in run:
            continue
        run.add(producer)
        op = program.ops[producer]
        wanted.extend(op.inputs)
    return tuple(sorted(run)), tuple(sorted(read))
