"""Where glibc puts large tensors while a budget is near, in processes of their own: what was chosen once stays so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from memfit import host
from memfit.mappings import mappings

pytestmark = pytest.mark.skipif(host.allocator() != "glibc", reason="malloc is not glibc's")

STEPS = """
    import json
    import torch
    import memfit
    from memfit.mappings import mappings

    MIB = 2**20

    def is_mapped():
        tensor = torch.empty(30 * MIB // 4)
        address = tensor.data_ptr()
        with open("/proc/self/maps") as maps:
            for line in maps:
                first, last = (int(end, 16) for end in line.split()[0].split("-"))
                if first <= address < last:
                    return not line.endswith("[heap]\\n")

    def train(steps):
        for _ in range(steps):
            model(torch.ones(8, 16, 32)).square().sum().backward()
            model.zero_grad()

    large = torch.ones(8 * MIB - 4096)
    del large  # from here on whatever is smaller lies in glibc's heap
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    found, other = {}, torch.nn.Identity()
    with memfit.fit(model, budget="min") as handle:
        train(3)
        assert handle.plan is not None
        found["held"] = is_mapped()
        if mappings() is not None:
            mappings().hold(other)
    found["held by another"] = is_mapped()
    if mappings() is not None:
        mappings().let_go(other)
    found["let go"] = is_mapped()
    with memfit.fit(model, budget="64GiB") as handle:
        train(3)
        assert handle.plan is not None
        found["far from the budget"] = is_mapped()
    print(json.dumps(found))
"""


def mapped(**environment: str) -> dict[str, bool]:
    """Whether a tensor of 30 MiB has a mapping of its own, at several moments of a process."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    command = [sys.executable, "-c", textwrap.dedent(STEPS)]
    done = subprocess.run(command, env={**env, **environment}, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, bool] = json.loads(done.stdout)
    return found


def test_large_tensors_are_mapped_while_a_budget_is_near():
    """And lie in the heap else, as they do in a process that has freed larger ones."""
    assert mapped() == {"held": True, "held by another": True, "let go": False, "far from the budget": False}


def test_what_somebody_chose_stays_so(monkeypatch):
    assert not any(mapped(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=33554432").values())
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    assert mappings.__wrapped__() is None
