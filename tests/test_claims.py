"""What ranks tell each other before one decides: which differences are numbers, which are other programs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memfit.claims import Claim, merge
from memfit.profiles import ProgramProfile, StepProfile
from programs import chain_step, llama_block

BLOCK = llama_block(length=16)


def step(block: ProgramProfile = BLOCK, *, outside: int = 100, count: int = 2) -> StepProfile:
    return chain_step([block] * count, outside=outside)


def claim(profile: StepProfile, rank: int = 0, budget: int | None = 10_000) -> Claim:
    """As it comes out of the store."""
    made = Claim.of(profile, rank=rank, name="Model", model="abc", budget=budget, born=False)
    assert Claim.from_json(made.to_json()) == made
    return made


def slower(block: ProgramProfile) -> ProgramProfile:
    return replace(block, ops=tuple([replace(op, seconds=op.seconds + 1) for op in block.ops]))


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (step(), step(outside=200)),
        (step(), step(replace(BLOCK, forward_bytes=BLOCK.forward_bytes + 6144))),
        (step(), step(replace(BLOCK, forward_seconds=BLOCK.forward_seconds + 1))),
        (step(), step(slower(BLOCK))),
    ],
    ids=["outside", "forward", "seconds", "ops"],
)
def test_numbers_may_differ_and_the_worst_counts(mine: StepProfile, theirs: StepProfile) -> None:
    claims = [claim(mine), claim(theirs, rank=1, budget=9_000)]
    assert claims[0].other_program(claims) == ""
    assert merge(mine, claims) == (theirs, 9_000)
    assert merge(theirs, claims) == (theirs, 9_000)


@pytest.mark.parametrize(
    ("theirs", "why"),
    [
        (step(llama_block(length=16, key="another")), "another program in `layers.0`"),
        (step(count=3), "3 block calls, rank 0 2"),
        (step(replace(BLOCK, saved=BLOCK.saved[:-1])), "programs whose values it may not drop alike"),
    ],
)
def test_another_program_has_a_plan_of_its_own(theirs: StepProfile, why: str) -> None:
    mine = claim(step())
    assert why in mine.other_program([mine, claim(theirs, rank=1)])


def test_another_model_stops_all() -> None:
    mine = claim(step())
    assert mine.other_model([mine]) == ""
    assert "Rank 0 trains Model (abc), rank 1 trains Other (def)" in mine.other_model(
        [mine, replace(mine, rank=1, name="Other", model="def")]
    )
