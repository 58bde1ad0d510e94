"""PEFT's adapters under the Trainer and by hand: exact gradients, and an error where they could not be."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("peft")

import peft
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import memfit
from memfit.errors import ChangedTensorError, RecomputeError
from memfit.integrations.transformers import MemfitCallback
from training import (
    SHORT_RUN,
    assert_less_is_alive,
    assert_planned,
    assert_same_weights,
    assert_untouched,
    history,
    llama,
    metered,
    rows,
    weights,
    written,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`gradient_checkpointing.*deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit.*"),
    pytest.mark.filterwarnings("ignore:Adapter default was active.*"),
    pytest.mark.filterwarnings("ignore:Already.*merge.*"),
]

TARGETS = ["q_proj", "v_proj", "up_proj"]


def lora(*, base=None, seed=1, adapters=("default",), **changes):
    """LoRA with dropout and B nonzero."""
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS, **changes)
    model = peft.get_peft_model(base or llama(), config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def frozen_embeddings():
    model = llama()
    model.get_input_embeddings().requires_grad_(False)
    return model


def kbit(**changes):
    """On a model that is not quantized it freezes and upcasts."""
    return lora(base=peft.prepare_model_for_kbit_training(llama().to(torch.bfloat16), **changes))


def quantized(folder, *, checkpointed=False, **options):
    """QLoRA: the base is loaded by bitsandbytes.

    Args:
        checkpointed: Whether PEFT switches checkpointing on, which it does unless it is told not to.
    """
    llama().to(torch.bfloat16).save_pretrained(folder)
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **options)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    return lora(base=peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointed))


def upcast_and_checkpointed():
    base = llama()
    base.activation_checkpointing_enable()
    base.enable_input_require_grads()
    return lora(base=base)


MODELS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "rslora with trained head": lambda: lora(use_rslora=True, modules_to_save=["lm_head"]),
    "lora on some layers": lambda: lora(layers_to_transform=[1, 3]),
    "frozen embeddings": frozen_embeddings,
    "kbit": kbit,
    "kbit, without checkpointing": lambda: kbit(use_gradient_checkpointing=False),
    "checkpointed before lora": upcast_and_checkpointed,
    "ia3": lambda: peft.get_peft_model(
        llama(), peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
}


def trained(folder, model, callback=None, **changes):
    arguments = TrainingArguments(folder, **{**SHORT_RUN, "max_steps": 4, **changes})
    trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=[callback] if callback is not None else [])
    metered(trainer).train()
    return trainer


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_weights_are_the_same(tmp_path, name):
    plain = trained(tmp_path / "plain", MODELS[name]())
    callback = MemfitCallback(budget="min")
    fitted = trained(tmp_path / "fitted", MODELS[name](), callback)
    assert len(history(plain)) == 4
    assert history(fitted) == history(plain)
    assert history(fitted, "grad_norm") == history(plain, "grad_norm")
    assert_same_weights(weights(fitted.model), weights(plain.model))
    assert_planned(callback.summary())
    # This one checkpoints its layers by itself in the plain run.
    assert_less_is_alive(
        fitted, trained(tmp_path / "kept", lora()) if MODELS[name] is upcast_and_checkpointed else plain
    )
    assert_untouched(fitted.model)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    "options", [{**NF4, "bnb_4bit_use_double_quant": True}, NF4], ids=["double quantization", "nf4"]
)
def test_blocks_with_4_bit_weights_are_replayed(tmp_path, options):
    plain = trained(tmp_path / "plain", quantized(tmp_path / "base", **options))
    callback = MemfitCallback(budget="min")
    fitted = trained(tmp_path / "fitted", quantized(tmp_path / "base", **options), callback)
    assert history(fitted) == history(plain)
    assert history(fitted, "grad_norm") == history(plain, "grad_norm")
    assert_same_weights(weights(fitted.model), weights(plain.model))
    assert {block["mode"] for block in callback.summary()["blocks"]} == {"replay"}
    whole = MemfitCallback(budget="min")
    trained(tmp_path / "whole", lora(), whole, max_steps=2)
    assert callback.summary()["model_flops"] == whole.summary()["model_flops"]
    assert_planned(callback.summary())
    assert_less_is_alive(fitted, plain)


def test_checkpointing_that_peft_switches_on_is_taken_over(tmp_path):
    """`prepare_model_for_kbit_training` as QLoRA's scripts call it."""
    plain = trained(tmp_path / "plain", quantized(tmp_path / "base", **NF4))
    callback = MemfitCallback(budget="min")
    model = quantized(tmp_path / "base", checkpointed=True, **NF4)
    assert model.is_activation_checkpointing
    fitted = trained(tmp_path / "fitted", model, callback)
    assert history(fitted) == history(plain)
    assert history(fitted, "grad_norm") == history(plain, "grad_norm")
    assert_same_weights(weights(fitted.model), weights(plain.model))
    assert_planned(callback.summary())
    assert_less_is_alive(fitted, plain)
    assert any("gradient_checkpointing_enable()` was taken over" in note for note in callback.summary()["notes"])
    assert model.is_activation_checkpointing


def test_8_bit_weights_are_left_alone(tmp_path):
    """Their layers keep what they need beside autograd."""
    plain = trained(tmp_path / "plain", quantized(tmp_path / "base", load_in_8bit=True))
    callback = MemfitCallback(budget="min")
    fitted = trained(tmp_path / "fitted", quantized(tmp_path / "base", load_in_8bit=True), callback)
    assert history(fitted) == history(plain)
    assert_same_weights(weights(fitted.model), weights(plain.model))
    assert any("Int8Params" in block["reason"] for block in callback.summary()["blocks"])


def test_statistics_of_4_bit_weights_that_are_written_before_the_backward(tmp_path):
    model = quantized(tmp_path / "base", **NF4).train()
    batch = {"input_ids": torch.arange(24).view(2, 12) % 20, "labels": torch.arange(24).view(2, 12) % 20}
    with memfit.fit(model, budget="min"):
        for _ in range(3):
            model(**batch).loss.backward()
        loss = model(**batch).loss
        with torch.no_grad():
            model.base_model.model.model.layers[1].mlp.gate_proj.weight.quant_state.absmax.mul_(2)
        with pytest.raises(ChangedTensorError, match=r"quant_state.absmax` changed between forward and backward"):
            loss.backward()


def test_statistics_of_4_bit_weights_that_are_replaced_between_steps(tmp_path):
    found = []
    for budget in (None, "min"):
        model = quantized(tmp_path / "base", **NF4).train()
        batch = {"input_ids": torch.arange(24).view(2, 12) % 20, "labels": torch.arange(24).view(2, 12) % 20}
        handle = memfit.fit(model, budget="min") if budget else contextlib.nullcontext()
        with handle:
            for step in range(5):
                if step == 3:
                    state = model.base_model.model.model.layers[1].mlp.gate_proj.weight.quant_state
                    state.absmax = state.absmax * 2
                torch.manual_seed(step)
                model.zero_grad()
                model(**batch).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_trainers_switch_and_lora(tmp_path):
    plain = trained(tmp_path / "plain", lora())
    callback = MemfitCallback(budget="min")
    fitted = trained(tmp_path / "fitted", lora(), callback, activation_checkpointing=True)
    assert history(fitted) == history(plain)
    assert_same_weights(weights(fitted.model), weights(plain.model))
    assert_planned(callback.summary())
    assert any("`activation_checkpointing=True` was taken over" in note for note in callback.summary()["notes"])


def test_adapters_are_saved_as_without(tmp_path):
    for run, callback in (("plain", None), ("fitted", MemfitCallback(budget="min"))):
        trained(tmp_path / run, lora(), callback, save_strategy="steps", save_steps=4)
    before, after = (written(tmp_path / run / "checkpoint-4") for run in ("plain", "fitted"))
    assert "adapter_model.safetensors" in before
    for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "rng_state.pth"):
        assert before[name] == after[name], name


def test_generation_without_the_adapter_between_updates():
    """As GRPO and DPO make their reference."""
    seen = []
    for fitted in (False, True):
        model = lora().train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        batch = {key: torch.tensor([row[key] for row in rows()[:4]]) for key in rows()[0]}
        torch.manual_seed(4)
        with memfit.fit(model, budget="min") if fitted else contextlib.nullcontext() as handle:
            losses = []
            for _ in range(4):
                with torch.no_grad(), model.disable_adapter():
                    reference = model(**batch).loss
                model.eval()
                tokens = model.generate(input_ids=batch["input_ids"][:1, :6], max_new_tokens=4, do_sample=False)
                model.train()
                loss = model(**batch).loss - reference
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses += [loss.item(), tokens.tolist()]
        seen.append(losses)
    assert seen[0] == seen[1]
    assert_planned(handle.summary())


def batch_of(number):
    return {key: torch.tensor([row[key] for row in rows()[4 * number : 4 * number + 4]]) for key in rows()[0]}


def step(model, optimizer, number, between=None):
    """One training step with something done between forward and backward."""
    torch.manual_seed(number)
    optimizer.zero_grad()
    loss = model(**batch_of(number)).loss
    undo = between(model) if between is not None else None
    loss.backward()
    if undo is not None:
        undo()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    return loss.item(), gradients


def disabled(model):
    context = model.disable_adapter()
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


def scaled(model):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


HARMLESS = {
    "switched": lambda model: model.set_adapter("other"),
    "disabled": disabled,
    "scaled": scaled,
    "evaluated": lambda model: model.eval() and None,
    "deleted": lambda model: model.delete_adapter("default"),
}


def merged_and_unmerged(model):
    model.merge_adapter()
    model.unmerge_adapter()


HARMFUL = {"merged": lambda model: model.merge_adapter(), "merged and unmerged": merged_and_unmerged}


def outcome(between, *, fitted, steps):
    """Loss and gradients where adapters change after the forward that follows ``steps`` steps."""
    model = lora(adapters=("default", "other")).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with memfit.fit(model, budget="min") if fitted else contextlib.nullcontext():
        for number in range(steps):
            step(model, optimizer, number % 3)
        return step(model, optimizer, 2, between)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", HARMLESS)
def test_adapters_that_change_before_the_backward(name, steps):
    """Autograd holds what it saved, whatever the adapters are called by then; so do recipes."""
    expected = outcome(HARMLESS[name], fitted=False, steps=steps)
    actual = outcome(HARMLESS[name], fitted=True, steps=steps)
    assert actual[0] == expected[0]
    assert actual[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        assert (gradient is None) == (actual[1][key] is None), key
        assert gradient is None or torch.equal(gradient, actual[1][key]), key


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", HARMFUL)
def test_adapters_that_are_merged_before_the_backward_are_an_error(name, steps):
    """Merging writes the weights through `.data`, which autograd cannot see: its own gradients are of a forward that
    never ran. Unmerging leaves other roundings."""
    honest = outcome(None, fitted=False, steps=steps)[1]
    unnoticed = outcome(HARMFUL[name], fitted=False, steps=steps)[1]
    assert any(not torch.equal(honest[key], unnoticed[key]) for key in honest if honest[key] is not None)
    with pytest.raises(RecomputeError):
        outcome(HARMFUL[name], fitted=True, steps=steps)


def test_training_goes_on_with_another_adapter():
    """Switched between steps, which is what the switch is for."""
    seen = []
    for fitted in (False, True):
        model = lora(adapters=("default", "other")).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        with memfit.fit(model, budget="min") if fitted else contextlib.nullcontext() as handle:
            found = []
            for number, adapter in enumerate(["default"] * 3 + ["other"] * 3 + ["default"] * 2):
                model.set_adapter(adapter)
                loss, gradients = step(model, optimizer, number % 3)
                found.append((loss, gradients))
        seen.append(found)
    for (loss, gradients), (expected, others) in zip(seen[1], seen[0], strict=True):
        assert loss == expected
        for key, gradient in others.items():
            assert (gradient is None) == (gradients[key] is None)
            assert gradient is None or torch.equal(gradient, gradients[key]), key
    assert_planned(handle.summary())
