"""Today's switches as policies: save everything, full and selective activation checkpointing.

Fast enough to be called while a model is being recorded: one pass over the ops and one back.
"""

from __future__ import annotations

from memfit.errors import PlanError
from memfit.plans import Policy
from memfit.profiles import ProgramProfile

_COSTLY = frozenset("mm addmm bmm baddbmm addbmm linear matmul mv addmv convolution _convolution".split())
"""The aten ops whose outputs selective activation checkpointing saves, attention kernels beside them."""


def plain_policy(program: ProgramProfile) -> Policy:
    """What autograd does by itself: every saved tensor is kept, and nothing else."""
    return Policy(program=program.key, kept=tuple(sorted(set(program.saved) - _parameters(program))))


def full_policy(program: ProgramProfile) -> Policy:
    """Full activation checkpointing: the block's inputs, what costs nothing, and what no recipe brings back."""
    return minimal_policy(program, _required(program))


def selective_policy(program: ProgramProfile) -> Policy:
    """Selective activation checkpointing: full, and saved outputs of matrix products, convolutions and attention."""
    kept = _required(program)
    for op in program.ops:
        if is_costly(op.name):
            kept.update(node for node in op.outputs if can_keep(program, node))
    return minimal_policy(program, kept)


def attention_policy(program: ProgramProfile) -> Policy:
    """Full activation checkpointing, and saved outputs of attention kernels: selective checkpointing as TRL has it."""
    kept = _required(program)
    for op in program.ops:
        if "scaled_dot_product" in op.name or "flash_attn" in op.name:
            kept.update(node for node in op.outputs if can_keep(program, node))
    return minimal_policy(program, kept)


def is_costly(name: str) -> bool:
    """Whether the op is a matrix product, a convolution or an attention kernel."""
    base = name.removeprefix("aten.").split(".")[0]
    return base in _COSTLY or "scaled_dot_product" in base


def can_keep(program: ProgramProfile, index: int) -> bool:
    """Whether a policy may keep a node: autograd saves it, or it is an input of the block."""
    node = program.nodes[index]
    return node.kind != "parameter" and node.keep_bytes is not None and (node.num_saved > 0 or node.kind == "input")


def runnable_ops(program: ProgramProfile) -> tuple[bool, ...]:
    """Which ops recipes can run under some policy: everything that they read can be kept or brought back."""
    nodes = program.nodes
    present = [node.kind == "parameter" or can_keep(program, index) for index, node in enumerate(nodes)]
    found = []
    for op in program.ops:
        runs = op.recomputable and all(present[node] for node in op.inputs)
        found.append(runs)
        if runs:
            for node in op.outputs:
                present[node] = True
    return tuple(found)


def forced_nodes(program: ProgramProfile, runnable: tuple[bool, ...]) -> frozenset[int]:
    """The nodes that every policy keeps: no recipe brings them back, or they cost nothing."""
    forced = set()
    for index in set(program.saved):
        node = program.nodes[index]
        if node.kind == "parameter":
            continue
        if node.must_keep or node.producer is None or not runnable[node.producer] or node.keep_bytes == 0:
            if not can_keep(program, index):
                raise PlanError(
                    f"Program `{program.key[:40]}` saves node {index}, which can be neither kept nor recomputed. "
                    "Leave the block out with `blocks=`."
                )
            forced.add(index)
    return frozenset(forced)


def minimal_policy(program: ProgramProfile, kept: set[int], narrowed: frozenset[int] = frozenset()) -> Policy:
    """A policy that keeps these nodes, without those that autograd does not save and no recipe reads."""
    present = kept | narrowed
    needed = set(program.saved) - present
    read: set[int] = set()
    for op in reversed(program.ops):
        if op.recomputable and not needed.isdisjoint(op.outputs):
            read.update(op.inputs)
            needed.update(node for node in op.inputs if node not in present)
    useful = set(program.saved) | read
    return Policy(
        program=program.key,
        kept=tuple(sorted((kept - narrowed) & useful)),
        narrowed=tuple(sorted(narrowed & useful)),
    )


def _required(program: ProgramProfile) -> set[int]:
    """What every policy keeps, and the block's inputs."""
    inputs = {n for n, node in enumerate(program.nodes) if node.kind == "input" and can_keep(program, n)}
    return inputs | forced_nodes(program, runnable_ops(program))


def _parameters(program: ProgramProfile) -> set[int]:
    return {index for index, node in enumerate(program.nodes) if node.kind == "parameter"}
