"""DeepSpeed-Chat's formula beside exact counts: equal where the formula is right, and named where it is off."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memfit.cli import main
from memfit.forecast import Forecast
from memfit.formulas import Counted, Sizes, compare

BATCH, LENGTH, HIDDEN, LAYERS, VOCABULARY = 2, 64, 32, 3, 96
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": LENGTH,
    "vocab_size": VOCABULARY,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}


@pytest.fixture
def save(tmp_path):
    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def predict(folder, **options):
    options = {"attention": "eager", "precision": "fp32", **options}
    return Forecast(folder, device="cpu", batch_size=BATCH, length=LENGTH, **options).within().formula


def flops_of_their_formula(factor, batch, length, layers, hidden, vocabulary):
    """`calculate_flops` of perf.py, written down once more."""
    return (24 * factor * batch * length * layers * hidden**2) * (
        1.0 + length / (6.0 * hidden) + vocabulary / (16.0 * layers * hidden)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [None, 8])
def test_the_formula_is_theirs(checkpointing, rank):
    sizes = Sizes(batch=BATCH, length=LENGTH, num_layers=LAYERS, hidden=HIDDEN, vocabulary=VOCABULARY, lora_rank=rank)
    factor = 4 if checkpointing else 3
    if rank is not None:
        factor -= 1 - rank * 2 / HIDDEN
    expected = flops_of_their_formula(factor, BATCH, LENGTH, LAYERS, HIDDEN, VOCABULARY)
    assert sizes.flops(checkpointing=checkpointing) == pytest.approx(expected, rel=1e-12)


def counted_by_torch(folder, **options):
    """FLOPs of an ordinary step of the same model, by torch's counter."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in options.get("freeze", ())))
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("freeze", [(), ("lm_head",)], ids=["all", "head frozen"])
def test_the_count_is_torchs(save, config, freeze):
    folder = save({**config, "tie_word_embeddings": False})
    found = predict(folder, freeze=list(freeze))
    assert found.rows[0].counted_flops == counted_by_torch(folder, freeze=freeze)


def test_where_the_formula_is_right_only_the_head_is_off(save):
    """GPT-2 with plain attention: the layers are those of the formula, to the last FLOP; the head has 6 BshV."""
    found = predict(save(GPT2))
    head = BATCH * LENGTH * HIDDEN * VOCABULARY
    row = found.rows[0]
    assert row.counted_flops - row.formula_flops == pytest.approx((6 - 4.5) * head, rel=1e-9)
    assert row.counted_factor == 3.0
    assert not any("projections" in reason for reason in found.reasons)
    (reason,) = [reason for reason in found.reasons if "head with the factor" in reason]
    assert f"{4.5 * head / 1e12:.3g} TFLOPs without" in reason
    assert f"there are {6 * head / 1e12:.3g}" in reason


def test_other_layers_are_named(save):
    found = predict(save(LLAMA))
    per_token = 2 * (HIDDEN * HIDDEN * (1 + 1 + 0.5 + 0.5) + 3 * HIDDEN * 4 * HIDDEN) + 4 * LENGTH * HIDDEN
    (reason,) = [reason for reason in found.reasons if "projections" in reason]
    assert f"there are {BATCH * LENGTH * LAYERS * per_token / 1e12:.3g}" in reason


def test_the_batch_of_one_device_is_not_that_of_all(save):
    folder = save(GPT2)
    alone, among = predict(folder), predict(folder, num_devices=8)
    assert among.rows[0].formula_flops == alone.rows[0].printed_flops == 8 * among.rows[0].printed_flops
    assert among.rows[0].counted_flops == alone.rows[0].counted_flops
    assert "by 8 devices" in among.reasons[0]
    assert not any("devices" in reason for reason in alone.reasons)


def test_lora_is_named_with_both_factors(save):
    found = predict(save(LLAMA), lora=4)
    assert found.rows[0].formula_factor == 2 + 2 * 4 / HIDDEN
    (reason,) = [reason for reason in found.reasons if "LoRA" in reason]
    assert f"{found.rows[0].counted_factor:.3g}" in reason


def test_nothing_to_say_where_nothing_is_off():
    sizes = Sizes(batch=1, length=8, num_layers=2, hidden=4, vocabulary=0)
    forward = sizes.block_flops
    counted = Counted(forward=forward, backward=2 * forward, recomputed=forward, head=0.0, blocks=forward)
    found = compare(sizes, counted, num_devices=1)
    assert found.reasons == ()
    assert all(row.counted_flops == row.formula_flops for row in found.rows)


def test_explain_shows_both_numbers(save, capsys):
    words = ["plan", save(LLAMA), "--batch", str(BATCH), "--seq", str(LENGTH), "--gpus", "4xh100"]
    assert main([*words, "--explain"]) == 0
    text = capsys.readouterr().out
    assert "\n  DeepSpeed-Chat " in text
    assert "\n  off: It divides the batch of one device by 4 devices" in text
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["formula"]
    assert [row["name"] for row in found["rows"]] == ["nothing", "full checkpointing"]


def test_an_embedder_has_no_such_formula(save, capsys):
    folder = save({**LLAMA, "architectures": ["LlamaModel"]})
    assert main(["plan", folder, "--task", "embedder", "--seq", "32", "--group", "2", "--explain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["formula"] is None
