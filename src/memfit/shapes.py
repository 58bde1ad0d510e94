"""Programs that differ in sizes only, as batches of other lengths make them: a plan for the larger serves the smaller.

A policy names nodes. Where two programs have the same *form* (the same ops on the same nodes, of which the same may be
recomputed, for the same reasons), a policy of one is a policy of the other: each is replayed by recipes over its own
recording, so that nothing about a value is taken over. And where no storage is larger, no event of the step is.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from hashlib import sha256

from memfit.programs import Program


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a program decides whether another's policies will do for it.

    Attributes:
        form: Hash of all that is no size.
        sizes: Bytes of each node's storage.
        inputs: Sizes of the tensors that the block is given, by their number.
    """

    form: str
    sizes: tuple[int, ...]
    inputs: dict[int, tuple[int, ...]]

    def covers(self, other: Shape) -> bool:
        """Whether a policy for this one holds no more memory for ``other`` than for this one."""
        return self.form == other.form and all(a >= b for a, b in zip(self.sizes, other.sizes, strict=True))

    def takes(self, given: list[tuple[int, ...]]) -> bool:
        """Whether arguments of these sizes are likely to be covered: none is longer in any dimension."""
        for number, size in self.inputs.items():
            if number >= len(given) or len(given[number]) != len(size):
                return False
            if any(a < b for a, b in zip(size, given[number], strict=True)):
                return False
        return True

    @property
    def total(self) -> int:
        """Bytes of all storages: how large the program is."""
        return sum(self.sizes)


def shape_of(program: Program, demoted: Set[int] = frozenset()) -> Shape:
    """The shape of a recorded program, of which some values are kept although recipes could bring them back."""
    digest = sha256(repr(sorted(demoted)).encode())
    for node in program.nodes:
        leaf = node.leaf
        digest.update(
            repr(
                (
                    (node.storage, node.value.dtype, str(node.device), node.producer, leaf),
                    (node.recomputable, node.custom, node.requires_grad, node.output),
                    (node.mask_scale, node.narrow_dtype),
                )
            ).encode()
        )
    for op in program.ops:
        target = op.target.node if op.target is not None else None
        digest.update(
            repr((str(op.func), op.inputs, op.outputs, op.recomputable, target, op.random, op.snapshot)).encode()
        )
    saved = [(s.value.node, s.is_leaf, s.value == program.nodes[s.value.node].value) for s in program.saved]
    digest.update(repr((saved, [value.node for value in program.outputs])).encode())
    inputs = {
        node.leaf.index: node.value.size
        for node in program.nodes
        if node.leaf is not None and node.leaf.kind == "input"
    }
    return Shape(digest.hexdigest()[:16], tuple(node.storage_bytes for node in program.nodes), inputs)
