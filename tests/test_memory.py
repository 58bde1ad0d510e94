"""Resident set, peaks, limits and allocators, as the kernel sees them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from memfit import host, memory
from memfit.errors import BudgetError

MIB = 2**20
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
TCMALLOC = host.find_allocator()


def test_now_follows_an_allocation():
    meter = memory.meter("cpu")
    meter.release()
    before = meter.now()
    tensor = torch.ones(64 * MIB // 4)
    grown = meter.now() - before
    # The kernel counts a thread's pages in batches, and other threads of this process live on.
    assert abs(grown - 64 * MIB) < 4 * MIB
    assert meter.allocated() == pytest.approx(meter.now(), abs=4 * MIB)
    del tensor
    meter.release()
    assert meter.now() - before < 8 * MIB


@LINUX
def test_peak_remembers_what_is_gone_until_reset():
    meter = memory.meter("cpu")
    meter.release()
    meter.reset_peak()
    if not meter.can_reset_peak:
        pytest.skip("the kernel does not reset peaks here")
    start = meter.now()
    tensor = torch.ones(64 * MIB // 4)
    del tensor
    assert 60 * MIB < meter.peak() - start < 72 * MIB
    meter.release()
    meter.reset_peak()
    assert meter.peak() - meter.now() < 8 * MIB


def test_peak_is_a_lower_bound_where_it_cannot_be_reset(monkeypatch):
    """Without /proc/self/clear_refs the highest value seen since the reset stands in."""
    monkeypatch.setattr(host, "reset_highest_resident", lambda: False)
    monkeypatch.setattr(host, "highest_resident_bytes", lambda: 900)
    values = iter([100, 300, 200, 150])
    monkeypatch.setattr(host, "resident_bytes", lambda: next(values))
    meter = memory.CpuMeter()
    meter.reset_peak()
    assert not meter.can_reset_peak
    meter.now()
    meter.now()
    assert meter.peak() == 300
    monkeypatch.setattr(host, "highest_resident_bytes", lambda: 1000)
    assert meter.peak() == 1000


def test_ranks_share_the_machine(monkeypatch):
    alone = memory.meter("cpu").total()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.meter("cpu").total() == alone // 4


def test_unknown_devices_are_refused():
    with pytest.raises(BudgetError, match=r"`meta`, whose memory Memfit cannot read"):
        memory.meter("meta")


def test_budgets_resolve():
    meter = memory.meter("cpu")
    assert memory.resolve_budget("6GiB", "cpu") == 6 * 2**30
    assert memory.resolve_budget(12345678, "cpu") == 12345678
    assert memory.resolve_budget("50%", "cpu") == meter.total() // 2
    assert memory.resolve_budget("min", "cpu") == "min"
    assert memory.resolve_budget(None, "cpu") is None
    automatic = memory.resolve_budget("auto", "cpu")
    assert isinstance(automatic, int)
    # Other processes come and go.
    assert meter.now() < automatic < meter.now() + meter.free()
    with pytest.raises(BudgetError):
        memory.resolve_budget("plenty", "cpu")


def test_cgroup_v2_limit_is_the_tightest_above(tmp_path):
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    inner = root / "user" / "job"
    inner.mkdir(parents=True)
    proc.mkdir()
    (proc / "cgroup").write_text("0::/user/job\n")
    (inner / "memory.max").write_text("max\n")
    (root / "user" / "memory.max").write_text(f"{8 * MIB}\n")
    (root / "user" / "memory.current").write_text(f"{5 * MIB}\n")
    (root / "user" / "memory.stat").write_text(f"anon 1\ninactive_file {MIB}\n")
    assert host.cgroup_limit_bytes(proc, root) == 8 * MIB
    assert host.cgroup_free_bytes(proc, root) == 4 * MIB


def test_cgroup_v1_limit_is_found_in_a_container(tmp_path):
    """The path is the host's, the mount shows the container's own cgroup as the root."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (root / "memory").mkdir(parents=True)
    proc.mkdir()
    (proc / "cgroup").write_text("5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    (root / "memory" / "memory.limit_in_bytes").write_text(f"{8 * MIB}\n")
    (root / "memory" / "memory.usage_in_bytes").write_text(f"{9 * MIB}\n")
    assert host.cgroup_limit_bytes(proc, root) == 8 * MIB
    assert host.cgroup_free_bytes(proc, root) == 0


def test_no_cgroup_limit(tmp_path):
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (root / "memory").mkdir(parents=True)
    proc.mkdir()
    assert host.cgroup_limit_bytes(proc, root) is None
    (proc / "cgroup").write_text("4:memory:/\n")
    (root / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert host.cgroup_limit_bytes(proc, root) is None
    assert host.cgroup_free_bytes(proc, root) is None


def test_total_is_bounded_by_ram():
    assert 0 < host.total_bytes() <= host.ram_bytes()
    assert 0 < host.free_bytes() <= host.ram_bytes()


FREED = """
from memfit import host
pieces = [bytes(60_000) for _ in range(3000)]
last = bytes(60_000)  # holds the top of the heap
full = host.resident_bytes()
del pieces
assert host.release()
print(host.allocator(), full - host.resident_bytes())
"""


@LINUX
@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (None, "glibc"),
        pytest.param(TCMALLOC, "tcmalloc", marks=pytest.mark.skipif(TCMALLOC is None, reason="no tcmalloc here")),
    ],
)
def test_allocators_are_known_and_hand_back(library, expected):
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    if library is not None:
        environment["LD_PRELOAD"] = library
    done = subprocess.run(
        [sys.executable, "-c", FREED], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    name, freed = done.stdout.split()
    if name == "other":
        pytest.skip("this C library is not known")
    assert name == expected
    # 180 MB were freed. The allocator keeps some of it, and pages that a live piece shares.
    assert int(freed) > 100_000_000


def test_opting_out_of_tcmalloc(monkeypatch):
    monkeypatch.setenv("MEMFIT_ALLOCATOR", "system")
    assert host.preload_candidate() is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_meter_counts_reserved_and_allocated():
    meter = memory.meter("cuda")
    meter.release()
    meter.reset_peak()
    before = meter.now(), meter.allocated()
    tensor = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    assert meter.allocated() - before[1] == 64 * MIB
    assert meter.now() >= meter.allocated()
    del tensor
    assert meter.allocated() == before[1]
    assert meter.allocated_peak() - before[1] == 64 * MIB
    meter.release()
    assert meter.now() == before[0]
    assert 0 < meter.free() < meter.total()
    assert meter.outside() > 0
