"""Base weights in 4 and 8 bits: the bytes of bitsandbytes' weights, and what its layers keep; measured with 0.50.2."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from memfit import configurations
from memfit.cli import main
from memfit.errors import ModelError, UsageError
from memfit.forecast import Forecast
from memfit.simulation.quantized import QuantizedLinear, notes, num_parameters, quantize
from memfit.solver.planner import switched

SIZES = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
# Of the Llama below, on CPU, after `replace_with_bnb_linear` and `get_peft_model`: bytes of `weight` and `quant_state`,
# or `SCB`; of all tensors between two steps; and at the peak of a step, as torch's profiler counts them: plain, and
# with transformers' gradient checkpointing.
BITSANDBYTES = {
    "4bit": (1_526_592, 5_371_680, 99_055_624, 33_571_568),
    "8bit": (2_938_368, 6_783_456, 109_773_512, 47_435_184),
}


def config(**changes):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    return transformers.LlamaConfig(**SIZES, **heads, architectures=["LlamaForCausalLM"], **changes)


def on_meta(name_or_config):
    found = configurations.load(name_or_config) if isinstance(name_or_config, str) else name_or_config
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(found, dtype=torch.bfloat16)


def packed_bytes(model):
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(t.nbytes for layer in layers for t in (layer.weight, *layer.buffers()))


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_weights_take_what_bitsandbytes_takes(kind):
    model = on_meta(config())
    quantize(model, kind)
    assert packed_bytes(model) == BITSANDBYTES[kind][0]


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_a_step_takes_what_it_takes_with_bitsandbytes(kind):
    """To the byte between steps, within 1% at the peak; under gradient checkpointing within 5%."""
    forecast = Forecast(config(), batch_size=4, length=256, precision="bf16", lora=8, quantize=kind, compares=False)
    _, held, plain, checkpointed = BITSANDBYTES[kind]
    parts = forecast.of(switched(forecast.profile, policy="plain")).peak.parts
    assert parts["weights"] + parts["optimizer_state"] == held
    assert switched(forecast.profile, policy="plain").predicted_peak_bytes == pytest.approx(plain, rel=0.01)
    assert switched(forecast.profile, policy="full").predicted_peak_bytes == pytest.approx(checkpointed, rel=0.05)


@pytest.mark.parametrize(("kind", "per_weight"), [("4bit", 0.5 + 1 / 64 + 4 / 64 / 256), ("8bit", 1)])
def test_a_known_model(kind, per_weight):
    """Llama 3 8B: seven matrices a layer; the head and the embeddings stay as they are."""
    model = on_meta("llama-3-8b")
    before = num_parameters(model)
    quantize(model, kind)
    assert num_parameters(model) == before
    weights = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    constants = 224 * (256 + 1 + 16) * 4 if kind == "4bit" else 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096) * 4
    assert packed_bytes(model) == weights * per_weight + constants
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.dtype is model.model.embed_tokens.weight.dtype is torch.bfloat16


def test_transposed_layers_and_a_tied_head():
    model = on_meta("gpt2")
    quantize(model, "4bit")
    first = model.transformer.h[0].attn.c_attn
    assert (first.in_features, first.out_features) == (768, 2304)
    assert first.bias.shape == (2304,)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer.wte.weight


def test_layers_that_the_model_keeps_in_fp32_are_left():
    """T5's: it casts what they get to the dtype of their weight, which packed would be bytes."""
    heads = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 3, "vocab_size": 100}
    t5 = transformers.T5Config(**heads, decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"])
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(t5)
    quantize(model, "4bit")
    dense = model.encoder.block[0].layer[1].DenseReluDense
    assert (type(dense.wi), type(dense.wo)) == (QuantizedLinear, nn.Linear)
    options = {"length": 32, "precision": "bf16", "lora": 4, "quantize": "4bit", "compares": False}
    assert Forecast(t5, **options).within("min").model == "T5ForConditionalGeneration in 4 bits with LoRA"


@pytest.mark.parametrize("experts", [True, False])
def test_experts_that_are_no_linear_layers_are_said(experts):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.MixtralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2) if experts else config()
        )
    quantize(model, "4bit")
    assert any("Quantized experts" in sentence for sentence in notes("4bit", model)) is experts


def test_the_prediction_says_what_it_leaves_out():
    forecast = Forecast(config(), length=64, precision="bf16", lora=8, quantize="8bit", compares=False)
    prediction = forecast.within("min")
    assert prediction.model == "LlamaForCausalLM in 8 bits with LoRA"
    assert any("keep their inputs" in sentence for sentence in prediction.not_counted)
    assert prediction.num_parameters == num_parameters(on_meta(config())) + prediction.num_trainable


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantize", "4bit"], "Give adapters with `--lora`"),
        (["--quantize", "4bit", "--lora", "4", "--freeze", "nothing"], "part of no parameter's name"),
    ],
)
def test_errors(words, message, capsys):
    assert main(["plan", "gpt2", "--seq", "16", *words]) == 2
    assert message in capsys.readouterr().err


def test_errors_in_python():
    with pytest.raises(UsageError, match="no quantization `2bit`"):
        Forecast(config(), length=16, lora=4, quantize="2bit")
    with pytest.raises(UsageError, match="give `lora`"):
        Forecast(config(), length=16, quantize="4bit")
    with torch.device("meta"):
        resnet = transformers.AutoModel.from_config(transformers.ResNetConfig())
    with pytest.raises(ModelError, match="no linear layer to quantize"):
        quantize(resnet, "4bit")


def test_quantized_steps_are_not_measured(capsys):
    with pytest.raises(SystemExit) as left:
        main(["bench", "gpt2", "--quantize", "4bit", "--lora", "4"])
    assert left.value.code == 2
    assert "does not know `--quantize 4bit`" in capsys.readouterr().err
