"""The options of a program with links: its input dropped, its output brought back, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from memfit.plans import Policy
from memfit.profiles import ProgramProfile
from memfit.solver.frontier import Option, prune
from memfit.solver.links import Returned, returned
from memfit.solver.special import can_keep
from memfit.solver.working_set import working_set

_BASES = 6
"""How many policies of a program are offered with links; all of them are without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """An option with or without links.

    Attributes:
        option: Its ``working_bytes`` and ``recompute_seconds`` are without bringing the input back.
        link_bytes: What is live when its input begins to come back; ``None``: the input is kept, if it is needed.
        output: The recipe of the call's output, if that may be brought back.
    """

    option: Option
    link_bytes: int | None = None
    output: Returned | None = None


class Variants:
    """The options of a program with links, made once for calls that are linked alike."""

    def __init__(self, options: Mapping[str, Sequence[Option]], programs: Mapping[str, ProgramProfile]) -> None:
        self._options = options
        self._programs = programs
        self._made: dict[tuple[str, int | None, int | None], list[Variant]] = {}

    def of(self, program: str, linked: int | None, output: int | None) -> list[Variant]:
        """All variants of a call whose input ``linked`` may be dropped, and whose output may be asked for."""
        key = program, linked, output
        if key not in self._made:
            self._made[key] = self._make(self._programs[program], self._options[program], linked, output)
        return self._made[key]

    def _make(
        self, program: ProgramProfile, options: Sequence[Option], linked: int | None, output: int | None
    ) -> list[Variant]:
        plain = [Variant(option=each) for each in options]
        if linked is not None and not (can_keep(program, linked) and program.nodes[linked].keep_bytes):
            linked = None
        found = []
        for each in options:
            dropping = [None] if linked is None or linked not in each.policy.kept else [None, linked]
            for dropped in dropping:
                for asked in dict.fromkeys((None, output)):
                    if dropped is not None or asked is not None:
                        found += _variant(program, each.policy, dropped, asked)
        if len(options) > _BASES:
            chosen = _few(found)
            found = [each for each in found if each.option.policy.kept in chosen]
        return plain + found


def _variant(program: ProgramProfile, policy: Policy, linked: int | None, output: int | None) -> list[Variant]:
    """The policy with these links, if there are such recipes; inputs that only the output's reads are kept for it."""
    kept = set(policy.kept) - {linked}
    made = replace(policy, kept=tuple(sorted(kept)), linked=linked, returned=output)
    recipe = returned(program, made)
    if output is not None and recipe is None:
        inputs = {n for n, node in enumerate(program.nodes) if node.kind == "input" and can_keep(program, n)}
        made = replace(made, kept=tuple(sorted(kept | (inputs - {linked}))))
        recipe = returned(program, made)
        if recipe is None:
            return []
    walked = working_set(program, made)
    if linked is not None and walked.link_bytes is None and (recipe is None or not recipe.reads_link):
        return []
    option = Option(
        policy=made,
        kept_bytes=walked.kept_bytes,
        recompute_seconds=walked.recompute_seconds,
        working_bytes=walked.peak_bytes,
    )
    return [Variant(option=option, link_bytes=walked.link_bytes, output=recipe)]


def _few(variants: list[Variant]) -> set[tuple[int, ...]]:
    """What the variants worth offering keep: few bytes, little time with the output brought back, small working set."""
    chosen: set[tuple[int, ...]] = set()
    for drops in (False, True):
        for gives in (False, True):
            priced = [
                replace(
                    each.option,
                    recompute_seconds=each.option.recompute_seconds + (each.output.seconds if each.output else 0.0),
                )
                for each in variants
                if (each.link_bytes is not None, each.output is not None) == (drops, gives)
            ]
            if priced:
                chosen.update(each.policy.kept for each in prune(priced, _BASES))
    return chosen
