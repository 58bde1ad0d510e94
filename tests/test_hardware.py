"""Devices: their numbers against the arithmetic of their chips, their names, what a roofline makes of them, and what
`memfit doctor --calibrate` measures and stores."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfit import calibration
from memfit.errors import CalibrationError, UnknownNameError, UsageError
from memfit.hardware import calibrated, entries, find, load_record, parse_gpus, record_path, save_record
from memfit.hardware.entry import SOURCED
from memfit.names import plain
from memfit.roofline import op_seconds

NAMES = [entry.name for entry in entries()]

# What whitepapers say of the chips: units (SMs, CUs), boost clock, FLOP per unit and clock in bf16 that accumulates in
# fp32.
CHIPS = {
    "rtx3060": (28, 1.777e9, 512),
    "rtx3090": (82, 1.695e9, 512),
    "rtx4090": (128, 2.52e9, 512),
    "rtx5090": (170, 2.407e9, 512),
    "rtxa6000": (84, 1.8e9, 1024),
    "l4": (58, 2.04e9, 1024),
    "l40s": (142, 2.52e9, 1024),
    "a100-40gb": (108, 1.41e9, 2048),
    "a100-80gb": (108, 1.41e9, 2048),
    "h100": (132, 1.83e9, 4096),
    "h200": (132, 1.83e9, 4096),
    "mi300x": (304, 2.1e9, 2048),
}
# Units, boost clock, fp32 lanes per unit: each does one multiplication and one addition per clock.
LANES = {
    "rtx3060": (28, 1.777e9, 128),
    "rtx3090": (82, 1.695e9, 128),
    "rtx4090": (128, 2.52e9, 128),
    "rtx5090": (170, 2.407e9, 128),
    "rtxa6000": (84, 1.8e9, 128),
    "l4": (58, 2.04e9, 128),
    "l40s": (142, 2.52e9, 128),
    "a100-80gb": (108, 1.41e9, 64),
    "h100": (132, 1.98e9, 128),
    "mi300x": (304, 2.1e9, 128),
    "m1": (8, 1.278e9, 128),
    "m1-max": (32, 1.296e9, 128),
    "m2": (10, 1.398e9, 128),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nobody's own calibration is read or replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memfit" / "hardware.json"


@pytest.fixture(scope="module")
def record():
    """A real calibration of the CPU, in short slices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "SLICE_SECONDS", {"cpu": 0.1, "cuda": 0.1})
        patch.setattr(torch.cuda, "is_available", lambda: False)
        before = torch.is_grad_enabled(), torch.backends.cuda.matmul.fp32_precision
        made = calibration.calibrate()
        assert (torch.is_grad_enabled(), torch.backends.cuda.matmul.fp32_precision) == before
        return made


@pytest.mark.parametrize("name", NAMES)
def test_every_number_says_where_it_is_from(name):
    entry = find(name)
    assert set(entry.sources) == set(SOURCED)
    assert all(entry.sources.values())
    for field in SOURCED:
        value = getattr(entry, field)
        assert (value is None) == entry.sources[field].startswith("none"), field


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_in_order(name):
    entry = find(name)
    rates = [entry.flops_per_second(dtype) for dtype in ("fp32", "tf32", "bf16")]
    assert rates == sorted(rates)
    assert entry.flops_per_second("fp16") == rates[-1]
    if "fp8" in entry.matmul_flops_per_second:
        assert entry.flops_per_second("fp8") == pytest.approx(2 * rates[-1], rel=0.02)  # datasheets round
    shares = [getattr(entry, field) for field in SOURCED if field.endswith("efficiency")]
    assert all(0 < share <= 1 for share in shares)


@pytest.mark.parametrize("name", CHIPS)
def test_tensor_rates_are_those_of_the_chip(name):
    """Dense, with fp32 accumulate. Datasheets round, and count clocks that differ by a percent."""
    units, clock, flops = CHIPS[name]
    assert find(name).flops_per_second("bf16") == pytest.approx(units * clock * flops, rel=0.015)


@pytest.mark.parametrize("name", LANES)
def test_fp32_rates_are_those_of_the_chip(name):
    """Apple rounds down."""
    units, clock, lanes = LANES[name]
    assert find(name).flops_per_second("fp32") == pytest.approx(units * clock * lanes * 2, rel=0.025)


def test_every_name_means_one_device():
    spellings = [plain(name) for entry in entries() for name in {plain(n) for n in (entry.name, *entry.aliases)}]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("A6000", "rtxa6000"),
        ("Apple M4 Max", "m4-max"),
        ("MI300X", "mi300x"),
        ("cpu", "cpu"),
    ],
)
def test_devices_are_found_however_they_are_written(text, name):
    assert find(text).name == name


@pytest.mark.parametrize(
    ("text", "near"), [("rtx4909", "rtx4090"), ("a100", "a100-80gb"), ("mi300", "mi300x"), ("h100 pci", "h100-pcie")]
)
def test_an_unknown_device_names_the_nearest(text, near):
    with pytest.raises(UnknownNameError, match=f"no device `{text}`") as caught:
        find(text)
    assert near in caught.value.nearest
    assert near in str(caught.value)


def test_a_device_like_no_other_names_all():
    with pytest.raises(UsageError, match=r"Known are rtx3060, .*, cpu") as caught:
        find("abacus")
    assert isinstance(caught.value, UnknownNameError)
    assert caught.value.nearest == ()


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [("64xh100", 64, "h100"), ("8 x A100-80GB", 8, "a100-80gb"), ("rtx4090", 1, "rtx4090"), ("2×l40s", 2, "l40s")],
)
def test_devices_are_counted(text, count, name):
    found, entry = parse_gpus(text)
    assert (found, entry.name) == (count, name)


def test_links_of_machines():
    """As many rings as the machine with fewest devices can feed, no faster than the links inside."""
    rates = {"h100": [450e9, 400e9, 50e9, 200e9], "b200": [900e9, 400e9, 50e9, 200e9], "rtx4090": [31.5e9] * 4}
    for name, expected in rates.items():
        rings = (range(8), range(16), range(0, 64, 8), range(12))
        assert [find(name).link_bytes_per_second(ring) for ring in rings] == expected
    assert find("a100-80gb").link_bytes_per_second(range(16)) == 200e9
    assert find("cpu").link_bytes_per_second(range(16)) is None


@pytest.mark.parametrize("text", ["0xh100", "99999999xh100", f"{'9' * 5000}xh100"])
def test_a_number_of_devices_that_cannot_be_is_refused(text):
    with pytest.raises(UsageError, match="write a number from 1 to"):
        parse_gpus(text)


@pytest.mark.parametrize("text", ["", "8x", "x8", "-1xh100", "8xh100x2", "4 rtx4090s"])
def test_what_counts_no_devices_is_refused(text):
    with pytest.raises(UnknownNameError):
        parse_gpus(text)


def test_dtypes_may_be_spelled_as_torch_does():
    entry = find("rtx4090")
    assert entry.flops_per_second("bf16") == entry.flops_per_second(str(torch.bfloat16)) == 165.2e12
    assert entry.flops_per_second("float32") == entry.flops_per_second("torch.float64") == 82.6e12


def test_nothing_stands_in_for_fp8():
    with pytest.raises(UsageError, match="`a100-80gb` has no fp8"):
        find("a100-80gb").flops_per_second("torch.float8_e4m3fn")


@pytest.mark.parametrize(
    ("kind", "flops", "num_bytes", "seconds"),
    [
        ("matmul", 312e12 * 0.87, 1.0, 1 + 5e-6),
        ("matmul", 312e12 * 0.87, 2039e9 * 0.9, 1 + 5e-6),
        ("matmul", 312e12 * 0.87, 2039e9 * 1.8, 2 + 5e-6),
        ("attention", 312e12 * 0.63, 1.0, 1 + 5e-6),
        ("elementwise", 0, 2039e9 * 0.85, 1 + 5e-6),
        ("elementwise", 1.0, 2039e9 * 0.85, 1 + 5e-6),
        ("copy", 0, 2039e9 * 0.9, 1 + 5e-6),
        ("matmul", 2.0, 2039e9 * 0.9, 1 + 5e-6),
        ("copy", 0, 0, 5e-6),
    ],
)
def test_an_op_is_as_slow_as_its_slower_half(kind, flops, num_bytes, seconds):
    found = op_seconds(find("a100-80gb"), kind, flops=flops, num_bytes=num_bytes, dtype="bf16")
    assert found == pytest.approx(seconds, rel=1e-12)


@given(
    st.sampled_from(NAMES),
    st.sampled_from(["matmul", "attention", "elementwise", "copy"]),
    st.floats(0, 1e18),
    st.floats(0, 1e12),
    st.floats(1, 10),
)
def test_more_work_never_takes_less(name, kind, flops, num_bytes, factor):
    entry = find(name)
    once = op_seconds(entry, kind, flops=flops, num_bytes=num_bytes, dtype="fp16")
    assert once >= entry.launch_seconds
    assert op_seconds(entry, kind, flops=flops * factor, num_bytes=num_bytes, dtype="fp16") >= once
    assert op_seconds(entry, kind, flops=flops, num_bytes=num_bytes * factor, dtype="fp16") >= once


def test_a_calibration_measures_this_machine(record):
    """Against one product and one copy timed here: within a factor of four, as other work may come between."""
    hardware = record.hardware
    assert hardware.name == "here"
    assert hardware.backend == "cpu"
    assert set(hardware.matmul_flops_per_second) == {"fp32", "bf16", "fp16"}
    assert hardware.host_link_bytes_per_second is None
    a = torch.randn(1024, 1024)
    assert 0.25 < hardware.flops_per_second("fp32") / (2 * 1024**3 / quickest(lambda: a @ a)) < 4
    b, c = torch.ones(2**24), torch.zeros(2**24)
    assert 0.25 < hardware.memory_bytes_per_second / (2 * 4 * 2**24 / quickest(lambda: c.copy_(b))) < 4
    assert 1e-7 < hardware.launch_seconds < 1e-3
    assert 0 < hardware.attention_efficiency < 10
    assert set(hardware.sources) == set(SOURCED)
    assert op_seconds(hardware, "matmul", flops=1e9, num_bytes=1e6, dtype="bf16") > 0


def quickest(run):
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def test_a_record_is_read_back_and_found_as_here(record, cache):
    assert calibrated() is None
    with pytest.raises(UsageError, match="`here` has not been measured"):
        find("here")
    assert save_record(record) == cache == record_path()
    assert load_record() == record
    assert find("here") == calibrated() == record.hardware
    assert parse_gpus("2xhere") == (2, record.hardware)
    assert [path.name for path in cache.parent.iterdir()] == ["hardware.json"]
    save_record(replace(record, device="another"))
    assert load_record().device == "another"


def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert record_path() == tmp_path / ".cache" / "memfit" / "hardware.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: "{", "Expecting property name"),
        (lambda data: "[1]", "the record is not an object"),
        (lambda data: "[" * 100_000, "calibration"),
        (lambda data: json.dumps(data | {"schema_version": 1}), "its schema version is 1"),
        (lambda data: json.dumps(data | {"more": 1}), "unknown field `more`"),
        (lambda data: json.dumps({name: value for name, value in data.items() if name != "date"}), "lacks the field"),
        (lambda data: json.dumps(data | {"device": "\x1b[31m"}), "`device` is not printable"),
        (lambda data: json.dumps(data | {"num_threads": True}), "`num_threads` is not a whole number"),
        (lambda data: json.dumps(data | {"hardware": None}), "`hardware` is not an object"),
        (lambda data: rates(data, copy_efficiency=0), "`copy_efficiency` is not a number above zero"),
        (lambda data: rates(data, launch_seconds=float("nan")), "`NaN` is not a number"),
        (lambda data: rates(data, launch_seconds="soon"), "`launch_seconds` is not a number"),
        (lambda data: rates(data, matmul_flops_per_second={"bf16": 1.0}), "lacks fp32"),
        (lambda data: rates(data, matmul_flops_per_second={"fp32": -1.0}), "`rate of fp32`"),
        (lambda data: rates(data, host_link_bytes_per_second=0), "`host_link_bytes_per_second`"),
        (lambda data: rates(data, backend="abacus"), "`backend` is `abacus`"),
        (lambda data: rates(data, sources={}), "`sources` lacks the field"),
        (lambda data: "\x00" * (2 << 20), "more than"),
    ],
)
def test_a_record_that_is_none_is_refused(record, cache, change, message):
    save_record(record)
    cache.write_text(change(json.loads(json.dumps(asdict(record)))))
    with pytest.raises(CalibrationError, match="Run `memfit doctor --calibrate` again") as caught:
        calibrated()
    assert message in str(caught.value)
    assert caught.value.path == str(cache)


def rates(data, **changes):
    return json.dumps(data | {"hardware": data["hardware"] | changes})


def test_a_record_that_cannot_be_written_or_read_says_why(record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="cannot be written"):
        save_record(record, tmp_path / "file" / "hardware.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CalibrationError, match="cannot be written"):
        save_record(record, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_record(tmp_path / "folder")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_calibration_measures_the_gpu():
    began = time.perf_counter()
    hardware = calibration.calibrate().hardware
    assert time.perf_counter() - began < 30
    assert hardware.backend == "cuda"
    assert hardware.host_link_bytes_per_second is not None
    assert hardware.flops_per_second("fp32") < hardware.flops_per_second("tf32") < hardware.flops_per_second("bf16")
    assert hardware.host_link_bytes_per_second < hardware.memory_bytes_per_second
