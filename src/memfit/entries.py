"""What is known of a block's calls: the program behind each signature, and how far it is trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from memfit.checks import Checks
from memfit.costs import nodes_of
from memfit.errors import MemfitError
from memfit.plans import Policy
from memfit.profiles import Node
from memfit.programs import UNEQUAL, Leaf, Program, ProgramNode
from memfit.replay import CompiledPolicy, compile_policy
from memfit.shapes import Shape, shape_of

if TYPE_CHECKING:
    from memfit.blocks import Block
    from memfit.runtime import Runtime

MAX_PROGRAMS_PER_BLOCK = 128
MAX_PROGRAMS = 512


class ProgramState:
    """A program, its compiled policies, and what has been learnt about it since."""

    def __init__(self, program: Program) -> None:
        """A program that was just recorded."""
        self.program = program
        self.key = program.key
        self.members = 0
        self.demoted: set[int] = set()
        self.version = 0
        self.epoch = 0  # recordings made in an earlier one are not believed
        self._compiled: dict[tuple[Policy | None, int], CompiledPolicy] = {}
        self.checks = Checks(program)
        self.saved_leaves = saved_leaves(program)
        self.held: frozenset[int] = frozenset()
        self._freed: set[int] = set()
        self._shape: tuple[int, Shape] | None = None
        self._nodes: tuple[int, tuple[Node, ...]] | None = None

    @property
    def shape(self) -> Shape:
        """What decides whether the policies of another program will do for this one, and its for another."""
        if self._shape is None or self._shape[0] != self.version:
            self._shape = (self.version, shape_of(self.program, self.demoted))
        return self._shape[1]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Its values, and what keeping each costs."""
        if self._nodes is None or self._nodes[0] != self.version:
            self._nodes = (self.version, nodes_of(self.program, held=self.held, demoted=self.demoted))
        return self._nodes[1]

    def is_resized(self, program: Program) -> bool:
        """Whether ``program`` is this one with other sizes."""
        return program.key != self.key and shape_of(program, self.demoted).form == self.shape.form

    def compile(self, policy: Policy | None) -> CompiledPolicy:
        """The policy (``None``: keep everything) with demoted values kept."""
        found = self._compiled.get((policy, self.version))
        if found is None:
            wanted = policy if policy is not None else self.keep_everything()
            narrowed = tuple(n for n in wanted.narrowed if n not in self.demoted)
            wanted = Policy(
                program=self.key,
                kept=tuple(sorted(set(wanted.kept) | self.demoted)),
                narrowed=narrowed,
                linked=wanted.linked if wanted.linked not in self.demoted else None,
                returned=wanted.returned if wanted.returned not in self.demoted else None,
            )
            try:
                found = compile_policy(self.program, wanted)
            except MemfitError:  # made for a recording in which more had proved itself
                found = compile_policy(self.program, self.keep_everything())
            self._compiled[(policy, self.version)] = found
        return found

    def keep_everything(self) -> Policy:
        """Save what autograd saves; parameters are there anyway."""
        nodes = self.program.nodes
        saved = {s.value.node for s in self.program.saved}
        return Policy(program=self.key, kept=tuple(sorted(n for n in saved if not _is_parameter(nodes[n]))))

    def demote(self, node: int) -> None:
        """Keep a value from now on: replayed, it was not the same."""
        self.demoted.add(node)
        self.version += 1

    def saw_held(self, alive: set[int], *, freed: set[int]) -> None:
        """Nodes whose storages outlived being dropped, and nodes whose did not: held is what every call saw alive."""
        self._freed |= freed
        held = (self.held | alive) - self._freed
        if held != self.held:
            self.held = frozenset(held)
            self.version += 1

    def distrust(self) -> None:
        """A recipe was wrong: whoever runs this program is recorded again."""
        self.epoch += 1

    def demoter(self, runtime: Runtime, block: str) -> Callable[[int, float], None]:
        """For frames that see a difference of a few ulp."""

        def demote(node: int, ulp: float) -> None:
            self.demote(node)
            runtime.note(
                f"ulp {self.key} {node}", f"`{block}`: a value differed by {ulp:.3g} ulp and is kept from now on"
            )

        return demote

    def add_time(self, program: Program) -> None:
        """Another recording of the same program: op times become the smaller of both, which is the less disturbed."""
        self.members += 1
        if program is self.program:
            return
        self._believe_less(program)
        if program.unproven < self.program.unproven:
            program.forward_seconds = min(self.program.forward_seconds, program.forward_seconds)
            self.program = program  # the same ops, of which more have proved themselves
            self.version += 1
            self._compiled.clear()
            return
        for mine, other in zip(self.program.ops, program.ops, strict=True):
            mine.seconds = min(mine.seconds, other.seconds)
        self.program.forward_seconds = min(self.program.forward_seconds, program.forward_seconds)

    def _believe_less(self, program: Program) -> None:
        """What gave other bits in one of two recordings is kept: no recipe runs it."""
        for mine, other in zip(self.program.ops, program.ops, strict=True):
            for one, of in ((mine, self.program), (other, program)):
                if one.recomputable and UNEQUAL in (mine.reason, other.reason):
                    one.recomputable, one.reason = False, UNEQUAL
                    for _, number in one.outputs:
                        of.nodes[number].recomputable, of.nodes[number].reason = False, UNEQUAL
                    self.version += 1


class Entry:
    """One signature of one block: which program it runs, and how far it is trusted."""

    __slots__ = ("calls", "epoch", "record_after", "record_again", "recordings", "state", "verified")

    def __init__(self, state: ProgramState) -> None:
        """Nothing verified yet."""
        self.state = state
        self.epoch = state.epoch
        self.calls = 0
        self.verified = 0
        self.recordings = 0
        self.record_after = 0
        self.record_again = False


def state_of(states: dict[str, ProgramState], program: Program) -> ProgramState:
    """What is known of a program that was just recorded.

    Keys do not name a device's number, since each rank has one of its own; recipes do. So a program that ran on another
    device than the one that is known begins anew; whoever runs that one keeps it.
    """
    known = states.get(program.key)
    if known is None or [n.device for n in known.program.nodes] != [n.device for n in program.nodes]:
        known = states[program.key] = ProgramState(program)
    return known


def remember(
    signature: Any, entry: Entry, *, block: Block, blocks: Iterable[Block], states: dict[str, ProgramState]
) -> None:
    """A block knows the recording of a signature now; of too many (batches of ever new lengths) the oldest goes.

    Args:
        signature: Of a call.
        entry: Its recording.
        block: Whose.
        blocks: Of the model.
        states: Programs of the model; of too many go those that no block remembers.
    """
    if len(block.entries) >= MAX_PROGRAMS_PER_BLOCK:
        block.entries.pop(next(iter(block.entries)))
    block.entries[signature] = entry
    if len(states) > MAX_PROGRAMS:
        used = {e.state.key for b in blocks for e in b.entries.values()}
        for key in states.keys() - used:
            del states[key]


def recorded_alike(block: Block, blocks: Iterable[Block], signature: Any) -> Entry | None:
    """What ``signature`` is for a block of the same class that was recorded equal to ``block`` before (rule 10)."""
    if not block.entries:
        return None
    known = {s: e.state.key for s, e in block.entries.items()}
    for other in blocks:
        entry = other.entries.get(signature)
        if other is block or entry is None or type(other.module) is not type(block.module):
            continue
        shared = [s for s in known if s in other.entries]
        if shared and all(other.entries[s].state.key == known[s] for s in shared):
            return entry
    return None


def saved_leaves(program: Program) -> tuple[tuple[Leaf, int, int], ...]:
    """Leaves that autograd saves: which, their storage, and the byte in the storage at which each begins."""
    numbers = sorted({saved.value.node for saved in program.saved if saved.is_leaf})
    nodes = [program.nodes[number] for number in numbers]
    return tuple((n.leaf, n.storage, n.value.offset * n.value.dtype.itemsize) for n in nodes if n.leaf is not None)


def _is_parameter(node: ProgramNode) -> bool:
    return node.leaf is not None and node.leaf.kind != "input"
