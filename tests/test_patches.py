"""Unsloth is recognised by what it puts in the place of torch's. It needs a GPU: a module of its name stands in."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.utils.checkpoint

import memfit
from memfit.integrations.switches import Held
from zoo import build

SOURCE = """
def unsloth_checkpoint(function, *args, **kwargs):
    calls.append(function)
    return function(*args)

class UnslothCheckpointFunction:
    pass

def fast_forward(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)
"""


@pytest.fixture
def unsloth(monkeypatch):
    """A module that patches the attributes that Unsloth patches, by the names that it uses."""
    module = types.ModuleType("unsloth_zoo.gradient_checkpointing")
    module.calls = []
    exec(SOURCE, vars(module))
    monkeypatch.setitem(sys.modules, "unsloth_zoo", types.ModuleType("unsloth_zoo"))
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", module.unsloth_checkpoint)
    monkeypatch.setattr(torch.utils.checkpoint, "CheckpointFunction", module.UnslothCheckpointFunction)
    return module


def unsloth_notes(handle):
    return [note for note in handle.summary()["notes"] if "Unsloth" in note]


def test_replaced_checkpointing_is_reported(unsloth):
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(2)])
    with memfit.fit(model, policy="full") as handle:
        notes = unsloth_notes(handle)
    instead = "blocks do not call it, the plan decides instead"
    assert notes == [
        f"Unsloth's `unsloth_checkpoint` stands in for `torch.utils.checkpoint.checkpoint`: {instead}",
        f"Unsloth's `UnslothCheckpointFunction` stands in for `torch.utils.checkpoint.CheckpointFunction`: {instead}",
    ]


def test_its_checkpointing_is_not_called(unsloth):
    """Its switch on a model is a word, `"unsloth"`, where others have `True`: off in training, and put back."""
    case = build("llama")
    model = case.model.train()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = "unsloth"
            module._gradient_checkpointing_func = unsloth.unsloth_checkpoint
    case.model(**case.batches(0)).loss.backward()
    assert unsloth.calls, "the switch does nothing without us"
    unsloth.calls.clear()
    with memfit.fit(model, policy="full") as handle:
        for step in range(3):
            model(**case.batches(step)).loss.backward()
        assert {block["mode"] for block in handle.summary()["blocks"]} == {"replay"}
        assert (
            "the model's own gradient checkpointing was taken over: the plan decides instead"
            in (handle.summary()["notes"])
        )
    assert unsloth.calls == []
    switches = {getattr(module, "gradient_checkpointing", None) for module in model.modules()}
    assert "unsloth" in switches


def test_replaced_methods_are_reported(unsloth):
    case = build("llama")
    layer = case.model.model.layers[0].mlp
    layer.forward = types.MethodType(unsloth.fast_forward, layer)
    with memfit.fit(case.model, policy="full") as handle:
        saved = "what kernels compute in replayed blocks is saved, never run again"
        assert f"Unsloth's code is at work (`fast_forward`): {saved}" in unsloth_notes(handle)


def test_without_it_nothing_is_said():
    case = build("llama")
    with memfit.fit(case.model, policy="full") as handle:
        assert handle.summary()["notes"] == []


def test_a_trainer_holds_a_word_too():
    """The same switch where a Trainer or a callback turns it off for the whole training."""
    model = build("llama").model
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = "unsloth"
    held = Held(model)
    assert held.was_on
    assert {getattr(module, "gradient_checkpointing", False) for module in model.modules()} == {False}
    held.restore()
    assert {getattr(module, "gradient_checkpointing", False) for module in model.modules()} == {False, "unsloth"}
