"""`memfit doctor`: what is here, and what Memfit will use."""

from __future__ import annotations

import json

import pytest
import torch

from memfit import __version__, calibration, host
from memfit.cli import doctor, main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nobody's own calibration is read or replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memfit" / "hardware.json"


@pytest.fixture
def facts():
    return doctor.examine()


def test_json_is_the_same_data(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["memfit"] == __version__
    assert facts["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["cpu"]["ram_bytes"] == host.ram_bytes()
    assert facts["cpu"]["usable_bytes"] <= facts["cpu"]["ram_bytes"]
    assert len(facts["gpus"]) == torch.cuda.device_count()


def test_text_names_what_will_be_used(capsys, facts):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert facts["uses"]["device"] in text
    assert all(advice in text for advice in facts["advice"])


def test_a_missing_allocator_is_recommended(facts):
    facts["uses"]["device"] = "cpu"
    facts["cpu"] |= {"tcmalloc": None, "allocator": "glibc"}
    assert any("libtcmalloc-minimal4" in advice for advice in doctor._advice(facts))


def test_a_kernel_that_keeps_its_peak_is_mentioned(facts):
    facts["cpu"]["peak_can_be_reset"] = False
    assert any("lower bounds" in advice for advice in doctor._advice(facts))


def test_a_gpu_is_shown(facts):
    facts["gpus"] = [{"index": 0, "name": "Card", "total_bytes": 2**34, "free_bytes": 2**33, "capability": "9.0"}]
    assert "cuda:0      Card, capability 9.0, 16.0 GiB, 8.00 GiB free" in doctor.render(facts)


def test_a_calibration_is_stored_and_shown(capsys, cache, monkeypatch):
    monkeypatch.setattr(calibration, "SLICE_SECONDS", {"cpu": 0.01, "cuda": 0.05})
    assert main(["doctor"]) == 0
    assert "calibrated  no: `memfit doctor --calibrate`" in capsys.readouterr().out
    assert main(["doctor", "--json", "--calibrate"]) == 0
    shown, progress = capsys.readouterr()
    record = json.loads(shown)["calibration"]
    assert record == json.loads(cache.read_text())
    assert "memfit: measuring matrix products in bf16\n" in progress
    assert f"memfit: calibration written to {cache}\n" in progress
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"calibrated  on {record['date']}, {record['device']}, 1 thread, torch {torch.__version__}" in text
    assert "measured    matmul fp32 " in text
    assert "measured    copy " in text


def test_a_calibration_that_cannot_be_read_is_refused(capsys, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("half a rec")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"advice      The calibration is `{cache}`. It is no calibration that can be used" in text
    assert "calibrated  no" in text
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["calibration"] is None
    assert str(cache) in facts["calibration_error"]


def test_a_calibration_that_cannot_be_stored_is_an_error(capsys, cache, monkeypatch):
    monkeypatch.setattr(calibration, "SLICE_SECONDS", {"cpu": 0.01, "cuda": 0.05})
    cache.parent.parent.write_text("a file where the folder should be")
    assert main(["doctor", "--calibrate"]) == 1
    error = capsys.readouterr().err
    assert f"memfit: The calibration is `{cache}`. It cannot be written: " in error


def test_another_card_than_the_calibrated_one_is_mentioned(facts):
    facts["gpus"] = [{"index": 0, "name": "Card", "total_bytes": 2**34, "free_bytes": 2**33, "capability": "9.0"}]
    facts["calibration"] = {"device": "Another Card"}
    assert "The calibration is of Another Card: run `memfit doctor --calibrate` again." in doctor._advice(facts)


def test_a_gpu_has_a_link_to_the_host():
    hardware = {
        "backend": "cuda",
        "matmul_flops_per_second": {"fp32": 5e13, "bf16": 8e14},
        "attention_efficiency": 0.5,
        "memory_bytes_per_second": 3e12,
        "elementwise_efficiency": 0.9,
        "launch_seconds": 4e-6,
        "host_link_bytes_per_second": 5.5e10,
    }
    record = {"date": "2026-01-31", "device": "Card", "num_threads": 8, "torch": "2.13.0", "hardware": hardware}
    assert doctor._calibration_rows(record) == [
        ("calibrated", "on 2026-01-31, Card, 8 threads, torch 2.13.0"),
        ("measured", "matmul fp32 50.0 TFLOP/s, bf16 800 TFLOP/s; attention 400 TFLOP/s"),
        ("measured", "copy 3.00 TB/s, host link 55.0 GB/s, element-wise 2.70 TB/s, launch 4.00 µs"),
    ]
