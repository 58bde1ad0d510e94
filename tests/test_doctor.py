"""`memfit doctor`: what is here, and what Memfit will use."""

from __future__ import annotations

import json

import pytest
import torch

from memfit import __version__, host
from memfit.cli import doctor, main


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
    assert "cuda:0     Card, capability 9.0, 16.0 GiB, 8.00 GiB free" in doctor.render(facts)
