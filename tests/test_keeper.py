"""When freed memory goes back: from what was held at each moment of a step and how high it went from there."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from memfit import host, keeper
from memfit.keeper import Keeper, Outlook, outlook
from memfit.limits import START, Limits
from memfit.memory import Meter

AFTER, BEFORE = ("after", 1), ("before", 1)
LIMITS = Limits(1000, {START: 100, ("after", 0): 300, AFTER: 200, BEFORE: 50})


@pytest.fixture(autouse=True)
def to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels aim at 990 of 1000 and leave 20 unused."""
    monkeypatch.setattr(keeper, "TOLERANCE", 0)


class Process:
    """A meter of a process that holds ``used`` bytes, and ``free`` more that nobody uses."""

    def __init__(self, used: int, free: int, *, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.used, self.free, self.eager, self.highest = used, free, False, used + free

    def now(self) -> int:
        return self.used + self.free

    def peak(self) -> int:
        return self.highest

    def reset_peak(self) -> None:
        self.highest = self.now()

    def release_some(self, size: int) -> None:
        self.free = max(0, self.free - size)

    def release_eagerly(self, *, on: bool) -> bool:
        self.eager = on
        return True

    def hold(self, used: int, free: int) -> None:
        """Hold so much from now on."""
        self.used, self.free = used, free
        self.highest = max(self.highest, used + free)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    made = Process(0, 0)
    monkeypatch.setattr(host, "release_eagerly", made.release_eagerly)
    return made


def test_freed_memory_serves_blocks_but_not_logits():
    assert outlook(LIMITS).levels == {START: 1000, ("after", 0): 1000, AFTER: 990 - 200, BEFORE: 1000}
    cautious = outlook(LIMITS, cautious=True)
    assert cautious.levels == {moment: 990 - growth for moment, growth in LIMITS.growths.items()}
    assert outlook(Limits()).levels == {}


@pytest.mark.parametrize(
    ("held", "peak", "level"),
    [
        (900, 990, 800),  # as it should be
        (700, 980, 800),  # room that may stay unused
        (700, 870, 800),  # this moment's growth of 170 fits above 800 too
        (800, 870, 850),  # half of the 100 that are left is used the next time
        (800, 1010, 780),  # over: by so much less the next time
        (850, 1010, 780),
        (1010, 1010, 800),  # held already when it began: what came before is to blame
    ],
)
def test_levels_learn_from_the_peak_that_follows(held: int, peak: int, level: int):
    seen = Outlook(1000, {AFTER: 800})
    seen.learn(AFTER, held=held, peak=peak)
    assert seen.levels == {AFTER: level}


def test_no_level_is_above_the_budget():
    seen = Outlook(1000, {AFTER: 990})
    seen.learn(AFTER, held=995, peak=100)
    assert seen.levels == {AFTER: 1000}


@pytest.mark.parametrize(
    ("used", "free", "left", "eager"),
    [
        (700, 90, 90, False),
        (700, 100, 90, False),
        (700, 260, 90, False),
        (785, 60, 5, False),
        (820, 60, 0, True),
    ],
)
def test_what_is_above_a_level_goes_back(process: Process, used: int, free: int, left: int, eager: bool):
    kept = Keeper(cast(Meter, process))
    kept.begin(Outlook(1000, {AFTER: 790}))
    process.hold(used, free)
    kept.reach(("after", 0))
    assert process.free == free
    kept.reach(AFTER)
    assert (process.free, process.eager) == (left, eager)
    kept.begin(Outlook())
    assert not process.eager


def test_a_moment_learns_when_the_next_one_comes(process: Process):
    kept = Keeper(cast(Meter, process))
    seen = Outlook(1000, {AFTER: 790, BEFORE: 1000})
    kept.begin(seen)
    process.hold(700, 50)
    kept.reach(AFTER)
    process.hold(1030, 0)
    process.hold(800, 230)
    assert seen.levels[AFTER] == 790
    kept.reach(BEFORE)
    assert seen.levels == {AFTER: 750 - 40, BEFORE: 1000}
    assert process.free == 200


def test_the_peak_of_a_step_is_the_highest_of_its_parts(process: Process):
    kept = Keeper(cast(Meter, process))
    kept.restart()
    kept.begin(Outlook(1000, {AFTER: 1000}))
    process.hold(900, 0)
    process.hold(500, 0)
    kept.reach(AFTER)
    process.hold(600, 0)
    assert kept.observe() == 900
    kept.restart()
    assert kept.observe() == 600


def test_on_cuda_nothing_is_handed_back():
    process = Process(900, 900, device="cuda:0")
    kept = Keeper(cast(Meter, process))
    kept.begin(Outlook(1000, {START: 500, AFTER: 500}))
    kept.reach(AFTER)
    assert process.free == 900


def test_without_a_meter_nothing_is_read():
    kept = Keeper()
    kept.begin(Outlook(1000, {START: 500}))
    assert kept.observe() == 0
