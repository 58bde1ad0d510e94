"""What a rank has measured, as data that ranks exchange; and the worst of what several have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Literal

from memfit.profiles import ProgramProfile, StepProfile

Budget = int | Literal["min"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One rank's numbers.

    Attributes:
        rank: Whose.
        name: Class of its model.
        model: The model's fingerprint.
        limit: Its budget.
        born: Whether its optimizer's state is there.
        structure: Hash of its profile without the numbers below; equal where one plan can serve.
        calls: Block and program of each call.
        outside_bytes: Of each event.
        forward_bytes: Of every program, in order of their keys: when temporaries go is not the program's alone.
        seconds: Of every program, in order of their keys: forward, backward, ops, narrowing of nodes; then outside.
    """

    rank: int
    name: str
    model: str
    limit: Budget
    born: bool
    structure: str
    calls: tuple[tuple[str, str], ...]
    outside_bytes: tuple[int, ...]
    forward_bytes: tuple[int, ...]
    seconds: tuple[float, ...]

    @staticmethod
    def of(profile: StepProfile, *, rank: int, name: str, model: str, budget: Budget, born: bool) -> Claim:
        """What a profile says."""
        seconds: list[float] = []
        for key in sorted(profile.programs):
            seconds += _seconds(profile.programs[key])
        forward = tuple(profile.programs[key].forward_bytes for key in sorted(profile.programs))
        bare = _with(profile, (0,) * len(profile.events), (0,) * len(forward), (0.0,) * (len(seconds) + 1))
        return Claim(
            rank=rank,
            name=name,
            model=model,
            limit=budget,
            born=born,
            structure=sha256(repr(bare).encode()).hexdigest()[:16],
            calls=tuple((call.name, call.program) for call in profile.calls),
            outside_bytes=tuple(event.outside_bytes for event in profile.events),
            forward_bytes=forward,
            seconds=(*seconds, profile.outside_seconds),
        )

    def to_json(self) -> str:
        """As text that `from_json` reads."""
        return json.dumps(asdict(self), allow_nan=False, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Claim:
        """A claim of a rank of the same job: it is not checked."""
        data = json.loads(text)
        lists = {name: tuple(data[name]) for name in ("outside_bytes", "forward_bytes", "seconds")}
        return Claim(**{**data, **lists, "calls": tuple((name, program) for name, program in data["calls"])})

    def other_model(self, claims: Sequence[Claim]) -> str:
        """Which rank trains another model than this one, in words, or ""."""
        for claim in claims:
            if claim.model != self.model:
                return (
                    f"Rank {self.rank} trains {self.name} ({self.model}), rank {claim.rank} trains {claim.name} "
                    f"({claim.model}): names, shapes or dtypes of parameters differ, or which of them train. Make the "
                    "same model on every rank before it is wrapped."
                )
        return ""

    def other_program(self, claims: Sequence[Claim]) -> str:
        """Which rank ran something that no common plan fits, in words, or ""."""
        for claim in claims:
            if claim.structure == self.structure:
                continue
            if len(claim.calls) != len(self.calls):
                what = f"{len(claim.calls)} block calls, rank {self.rank} {len(self.calls)}"
            else:
                pairs = zip(self.calls, claim.calls, strict=True)
                where = next((mine[0] for mine, theirs in pairs if mine != theirs), "")
                what = f"another program in `{where}`" if where else "programs whose values it may not drop alike"
            return f"rank {claim.rank} ran {what} (another shape, or other code, than rank {self.rank})"
        return ""


def merge(profile: StepProfile, claims: Sequence[Claim]) -> tuple[StepProfile, Budget]:
    """The profile with the worst of all ranks' numbers, and their smallest budget."""
    outside = tuple(map(max, zip(*(claim.outside_bytes for claim in claims), strict=True)))
    forward = tuple(map(max, zip(*(claim.forward_bytes for claim in claims), strict=True)))
    seconds = tuple(map(max, zip(*(claim.seconds for claim in claims), strict=True)))
    limits = [claim.limit for claim in claims]
    sizes = [limit for limit in limits if isinstance(limit, int)]
    budget: Budget = "min" if "min" in limits else min(sizes) if sizes else None
    return _with(profile, outside, forward, seconds), budget


def _seconds(program: ProgramProfile) -> list[float]:
    ops = [op.seconds for op in program.ops]
    return [program.forward_seconds, program.backward_seconds, *ops, *(n.narrow_seconds for n in program.nodes)]


def _with(
    profile: StepProfile, outside: tuple[int, ...], forward_bytes: tuple[int, ...], seconds: tuple[float, ...]
) -> StepProfile:
    """A profile with other numbers."""
    rest = iter(seconds)
    programs: dict[str, ProgramProfile] = {}
    for key, size in zip(sorted(profile.programs), forward_bytes, strict=True):
        program = profile.programs[key]
        forward, backward = next(rest), next(rest)
        ops = tuple([replace(op, seconds=next(rest)) for op in program.ops])
        nodes = tuple([replace(node, narrow_seconds=next(rest)) for node in program.nodes])
        programs[key] = replace(
            program, forward_seconds=forward, backward_seconds=backward, forward_bytes=size, ops=ops, nodes=nodes
        )
    events = tuple([replace(e, outside_bytes=size) for e, size in zip(profile.events, outside, strict=True)])
    return replace(profile, programs=programs, events=events, outside_seconds=next(rest))
