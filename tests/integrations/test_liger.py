"""Liger's real kernels on a tiny Llama, run on CPU by Triton's interpreter: saved, never replayed, and named.

The interpreter stands in for a GPU in three places, below. It is no test of speed, nor of what is compiled for CUDA.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes
from transformers.models.llama import modeling_llama
from triton.language.extra import libdevice
from triton.runtime import interpreter

import memfit
from training import llama, rows

# The interpreter knows no functions of libdevice: the same by one that it knows, before Liger imports it.
libdevice.rsqrt = lambda x: 1.0 / tl.sqrt(x)
apply_liger_kernel_to_llama = pytest.importorskip("liger_kernel.transformers").apply_liger_kernel_to_llama

pytestmark = [pytest.mark.filterwarnings("ignore")]
STEPS = 4
REPLACED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")


class Launches:
    """Runs kernels by the interpreter, and counts them."""

    def __init__(self, monkeypatch):
        self.count = 0
        convert, execute = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

        def implicit_cvt(argument):
            # A compiled kernel gets Python's floats as float32; the interpreter leaves them as they are.
            if isinstance(argument, float):
                handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
                return tl.tensor(handle, tl.float32)
            return convert(argument)

        def call(executor, *args, **kwargs):
            self.count += 1
            with _disable_current_modes():  # on a GPU nothing in torch sees what a kernel does
                return execute(executor, *args, **kwargs)

        monkeypatch.setattr(interpreter, "_implicit_cvt", implicit_cvt)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What Liger replaces in transformers is back after each test."""
    for name in REPLACED:
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", modeling_llama.LlamaForCausalLM.forward)


@pytest.fixture
def liger(restored):
    """Llama's classes and functions with Liger's in their places."""
    apply_liger_kernel_to_llama()


def batch(step):
    chosen = rows(24)[2 * step : 2 * step + 2]
    return {name: torch.tensor([row[name] for row in chosen]) for name in chosen[0]}


def trained(**options):
    """Losses, gradients of every step, and what is reported."""
    model = llama(num_layers=2, dropout=0.0, hidden_size=16, intermediate_size=32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = memfit.fit(model, **options) if options else None
    seen = []
    for step in range(STEPS):
        loss = model(**batch(step)).loss
        loss.backward()
        seen += [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    return seen, handle.summary() if handle is not None else None


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("options", [{"budget": "min"}, {"policy": "full"}], ids=["min", "full"])
def test_kernels_are_saved_not_replayed(launches, options):
    """Each kernel runs as often as without Memfit, and every gradient is the same to the last bit."""
    expected, _ = trained()
    plain_launches, launches.count = launches.count, 0
    actual, summary = trained(**options)
    assert launches.count == plain_launches > 0
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert {block["mode"] for block in summary["blocks"]} == {"replay"}
    assert summary["recomputed_bytes"] > 0
    assert not [note for note in summary["notes"] if "recorded again" in note]


@pytest.mark.usefixtures("liger")
def test_what_liger_does_is_reported():
    model = llama(num_layers=2)
    notes = memfit.fit(model, budget="min").summary()["notes"]
    named = next(note for note in notes if note.startswith("Liger's kernels are at work"))
    for name in ("LigerSwiGLUMLP", "LigerRMSNorm", "lce_forward", "liger_rotary_pos_emb"):
        assert f"`{name}`" in named
    assert "Liger's fused loss is at work: the logits are never there as a whole" in notes


def test_a_model_that_is_there_already():
    """Liger then binds its methods to the model's own modules."""
    model = llama(num_layers=2)
    apply_liger_kernel_to_llama(rope=False, fused_linear_cross_entropy=False, rms_norm=False, model=model)
    notes = memfit.fit(model, budget="min").summary()["notes"]
    assert len(notes) == 1
    assert notes[0].startswith("Liger's kernels are at work (`LigerSwiGLUMLP.forward`):")


def test_imported_alone_it_is_not_reported():
    model = llama(num_layers=2)
    assert memfit.fit(model, budget="min").summary()["notes"] == []
