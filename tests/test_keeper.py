"""How what a process holds is kept within a budget: by the heap's own limit, or by handing memory back in time."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import textwrap
from typing import Any, cast

import pytest
import torch

from memfit import host, keeper
from memfit.heap import Heap
from memfit.keeper import Keeper
from memfit.limits import START, Limits
from memfit.memory import Meter

AFTER, BEFORE = ("after", 1), ("before", 1)
LIMITS = Limits(1000, {START: 100, AFTER: 200, BEFORE: 50})


class Process:
    """A meter of a process that holds ``used`` bytes, and ``free`` more that nobody uses."""

    def __init__(self, *, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.used = self.free = self.highest = 0

    def now(self) -> int:
        return self.used + self.free

    def peak(self) -> int:
        return self.highest

    def reset_peak(self) -> None:
        self.highest = self.now()

    def release(self) -> None:
        self.free = 0

    def hold(self, used: int, free: int) -> None:
        """Hold so much from now on."""
        self.used, self.free = used, free
        self.highest = max(self.highest, used + free)


class Limited:
    """A heap that writes down its limit."""

    size: int | None = None

    def limit(self, size: int) -> None:
        self.size = size

    def lift(self) -> None:
        self.size = None


def keep(process: Process, monkeypatch: pytest.MonkeyPatch, heap: Limited | None = None) -> Keeper:
    monkeypatch.setattr(keeper, "heap", lambda: cast(Heap | None, heap))
    return Keeper(cast(Meter, process))


@pytest.mark.parametrize(
    ("moment", "used", "free", "left"),
    [
        (START, 800, 50, 50),
        (START, 800, 51, 0),
        (AFTER, 600, 100, 100),
        (AFTER, 600, 101, 0),
        (BEFORE, 700, 225, 225),
        (BEFORE, 700, 226, 0),
        (("after", 0), 900, 500, 500),
    ],
)
def test_freed_memory_goes_back_where_the_next_event_would_not_fit(
    moment: Any, used: int, free: int, left: int, monkeypatch: pytest.MonkeyPatch
):
    process = Process()
    kept = keep(process, monkeypatch)
    kept.begin(LIMITS)
    process.hold(used, free)
    if moment == START:
        kept.begin(LIMITS)
    else:
        kept.reach(moment)
    assert process.free == left


def test_a_heap_that_takes_a_limit_needs_no_moments(monkeypatch: pytest.MonkeyPatch):
    process, heap = Process(), Limited()
    kept = keep(process, monkeypatch, heap)
    kept.begin(LIMITS)
    assert heap.size == 996
    process.hold(900, 900)
    kept.reach(AFTER)
    assert process.free == 900
    assert not kept.minds(AFTER)
    kept.begin(Limits())
    assert heap.size is None
    kept.begin(LIMITS)
    kept.relax()
    assert heap.size is None


class Mapped:
    """Mappings that write down whether somebody holds a budget."""

    on: bool | None = None

    def hold(self, holder: object) -> None:
        self.on = True

    def let_go(self, holder: object) -> None:
        self.on = False


def test_large_tensors_are_mapped_unless_steps_stay_far_from_the_budget(monkeypatch: pytest.MonkeyPatch):
    mapped = Mapped()
    monkeypatch.setattr(keeper, "heap", lambda: None)
    monkeypatch.setattr(keeper, "mappings", lambda: mapped)
    Keeper(cast(Meter, Process(device="cuda:0"))).begin(LIMITS)
    kept = Keeper(cast(Meter, Process()))
    assert mapped.on is None
    kept.begin(LIMITS)
    assert mapped.on
    kept.begin(Limits())
    assert mapped.on, "a step that no plan knows"
    kept.begin(Limits(1000))
    assert not mapped.on
    kept.begin(LIMITS)
    kept.relax()
    assert not mapped.on


def test_on_cuda_nothing_is_handed_back_in_a_step(monkeypatch: pytest.MonkeyPatch):
    process, heap = Process(device="cuda:0"), Limited()
    kept = keep(process, monkeypatch, heap)
    process.hold(100, 900)
    kept.begin(LIMITS)
    process.hold(900, 900)
    kept.reach(AFTER)
    assert process.free == 900
    assert heap.size is None


def test_on_cuda_what_an_evaluation_has_left_goes_back_before_a_step(monkeypatch: pytest.MonkeyPatch):
    process = Process(device="cuda:0")
    kept = keep(process, monkeypatch)
    process.hold(100, 901)
    kept.begin(Limits())
    assert process.free == 901, "a step that no plan knows"
    kept.begin(LIMITS)
    assert process.free == 0


def test_the_peak_of_a_step_is_the_highest_of_its_parts(monkeypatch: pytest.MonkeyPatch):
    process = Process()
    kept = keep(process, monkeypatch)
    process.hold(900, 0)
    process.hold(500, 0)
    assert kept.observe() == 900
    process.hold(600, 0)
    assert kept.observe() == 900
    kept.restart()
    assert kept.observe() == 600


def test_what_follows_the_optimizer_is_no_part_of_the_step(monkeypatch: pytest.MonkeyPatch):
    process = Process()
    kept = keep(process, monkeypatch)
    process.hold(500, 0)
    kept.close(final=False)
    process.hold(600, 0)
    kept.close(final=True)
    assert kept.highest == 600
    process.hold(900, 0)
    assert kept.observe() == 600
    kept.restart()
    assert kept.observe() == 900


def test_without_a_meter_nothing_is_read():
    kept = Keeper()
    kept.begin(LIMITS)
    kept.reach(AFTER)
    assert kept.observe() == 0


HEAP = """
    import json, resource, sys, threading
    import torch
    from memfit import host
    from memfit.heap import heap

    MIB = 2**20
    made = heap()
    if made is None:
        print(json.dumps(None))
        sys.exit()
    found = {}
    host.release()
    made.settle()
    made.limit(full := host.resident_bytes() + 200 * MIB)
    room = made.limit_bytes - made.resident_bytes()
    unwritten = torch.empty(16 * MIB)  # 64 MiB that the heap has taken and that are not resident yet
    made.limit(full)
    found["for_the_unwritten"] = (room - (made.limit_bytes - made.resident_bytes())) / MIB
    del unwritten
    tensors = [torch.ones(2 * MIB) for _ in range(50)]
    full = host.resident_bytes()
    del tensors[::2]
    made.limit(full)
    large = torch.ones(30 * MIB)  # 120 MiB: more than any gap
    found["within"], found["limited"] = host.resident_bytes() / full, made.limited
    more = torch.ones(50 * MIB)
    found["beyond"], found["still_limited"] = host.resident_bytes() / full, made.limited

    made.limit(host.resident_bytes() + 50 * MIB)
    held = []
    threads = [threading.Thread(target=lambda: held.append(torch.ones(20 * MIB))) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    found["threads"] = len(held)

    resource.setrlimit(resource.RLIMIT_AS, (16 * 1024 * MIB,) * 2)
    made.limit(host.resident_bytes() + 50 * MIB)
    try:
        torch.empty(8 * 1024 * MIB)
    except RuntimeError as error:
        found["error"] = host.memory_ran_out(error)
    made.limit(full)
    made.lift()
    found["lifted"] = not made.limited
    print(json.dumps(found))
"""


@pytest.mark.skipif(host.find_allocator() is None, reason="no tcmalloc to load")
def test_a_limited_heap_hands_back_what_is_free_and_then_gives_way():
    """In a process of its own, since the allocator is chosen when a process starts."""
    env = {"LD_PRELOAD": str(host.find_allocator()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(HEAP)]
    found = json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    if platform.machine() != "x86_64":
        assert found is None
        return
    assert found["for_the_unwritten"] == pytest.approx(64, abs=4)
    assert found["within"] <= 1.02
    assert found["limited"]
    assert found["beyond"] > 1.1
    assert not found["still_limited"]
    assert found["threads"] == 8
    assert found["error"]
    assert found["lifted"]
