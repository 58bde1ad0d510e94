"""What is known of a block's calls: the program behind each signature, and how far it is trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memfit.errors import MemfitError
from memfit.plans import Policy
from memfit.programs import Program
from memfit.replay import CompiledPolicy, compile_policy

if TYPE_CHECKING:
    from memfit.runtime import Runtime


class ProgramState:
    """A program, its compiled policies, and what has been learnt about it since."""

    def __init__(self, program: Program) -> None:
        """A program that was just recorded."""
        self.program = program
        self.key = program.key
        self.members = 0
        self.demoted: set[int] = set()
        self.version = 0
        self._compiled: dict[tuple[Policy | None, int], CompiledPolicy] = {}
        self.checks = _checks(program)
        self.held: frozenset[int] = frozenset()

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
        """Save what autograd saves."""
        return Policy(program=self.key, kept=tuple(sorted({s.value.node for s in self.program.saved})))

    def demote(self, node: int) -> None:
        """Keep a value from now on: replayed, it was not the same."""
        self.demoted.add(node)
        self.version += 1

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
        if program.unproven < self.program.unproven:
            program.forward_seconds = min(self.program.forward_seconds, program.forward_seconds)
            self.program = program  # the same ops, of which more have proved themselves
            self.version += 1
            self._compiled.clear()
            return
        for mine, other in zip(self.program.ops, program.ops, strict=True):
            mine.seconds = min(mine.seconds, other.seconds)
        self.program.forward_seconds = min(self.program.forward_seconds, program.forward_seconds)


class Entry:
    """One signature of one block: which program it runs, and how far it is trusted."""

    __slots__ = ("calls", "record_after", "record_again", "recordings", "state", "verified")

    def __init__(self, state: ProgramState) -> None:
        """Nothing verified yet."""
        self.state = state
        self.calls = 0
        self.verified = 0
        self.recordings = 0
        self.record_after = 0
        self.record_again = False


def _checks(program: Program) -> list[tuple[Any, ...]]:
    """What a call's packed tensors must show, one flat tuple each."""
    checks = []
    for saved in program.saved:
        node = program.nodes[saved.value.node]
        known = saved.is_leaf or node.producer is not None
        checks.append(
            (
                saved.value.size,
                saved.value.stride,
                saved.value.dtype,
                saved.version if node.producer is not None and not saved.is_leaf else None,
                saved.value.offset * saved.value.dtype.itemsize,
                node.storage if known else -1,
                saved.constant,
                saved.device,
            )
        )
    return checks
