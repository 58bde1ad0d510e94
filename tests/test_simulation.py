"""A step on fake tensors: the programs of a live step, its bytes within percents, its FLOPs exactly."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import memfit
from live import peak, settled_peak
from memfit import chunked, configurations, hardware
from memfit.blocks import find_blocks
from memfit.errors import ModelError, UsageError
from memfit.forecast import Forecast
from memfit.plans import Plan
from memfit.simulation import chunks
from memfit.simulation.fakes import fake_tensors, twin
from memfit.simulation.ledger import Ledger
from memfit.simulation.optimizers import make_optimizer
from memfit.simulation.rehearsal import Rehearsal
from memfit.simulation.target import CudaKernels
from memfit.solver.planner import switched

aten = torch.ops.aten
VOCABULARY = 1000
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, intermediate_size=344, num_key_value_heads=2, use_cache=False)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **SIZES, intermediate_size=344, num_key_value_heads=2, head_dim=32, use_cache=False, pad_token_id=0
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=128, n_layer=5, n_head=4, bos_token_id=0, eos_token_id=0, use_cache=False
        )
    ),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, intermediate_size=512)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **SIZES, intermediate_size=128, num_key_value_heads=2, num_local_experts=4, use_cache=False
        )
    ),
}
CAPPED = {
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, intermediate_size=344, num_key_value_heads=2, head_dim=32, use_cache=False)
    ),
}
TARGETS = {"gpt2": ["c_attn"], "bert": ["query"], "mixtral": ["q_proj"]}
EXPERTS = {"mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def make(name, kind="full"):
    torch.manual_seed(0)
    model = (MODELS | CAPPED)[name]()
    if kind == "lora":
        config = peft.LoraConfig(
            r=4,
            target_modules=TARGETS.get(name, ["q_proj", "v_proj"]),
            target_parameters=EXPERTS.get(name),
            lora_dropout=0.0 if name in EXPERTS else 0.1,  # PEFT takes none on parameters
            fan_in_fan_out=name == "gpt2",
        )
        model = peft.get_peft_model(model, config)
    elif kind == "frozen":
        for _, block in find_blocks(model)[:2]:
            block.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(False)
    return model.train()


def batch_for(name, rows=2, length=192):
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.zeros(rows, dtype=torch.long) if name == "bert" else ids.clone()}


def measured(name, kind, plan, **options):
    """The most bytes that tensors held in a real step under a plan; the canary's few large hashes left out."""
    model, batch = make(name, kind), batch_for(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    handle = memfit.fit(model, plan=plan, optimizer=optimizer, **options) if plan is not None else None

    def step():
        loss = model(**batch).loss
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    found = settled_peak(step, model, optimizer, batch)
    if handle is not None:
        assert {block["mode"] for block in handle.summary()["blocks"]} == {"replay"}
        handle.remove()
    return found


# What is predicted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["plain", "full"])
@pytest.mark.parametrize("kind", ["full", "lora", "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_is_that_of_a_real_step(name, kind, policy):
    """Counted in live tensors: within 1% where nothing is recomputed, 3.5% else; never over what is promised."""
    forecast = Forecast(make(name, kind), batch_for(name))
    plan = switched(forecast.profile, policy=policy, **forecast.named)
    actual = measured(name, kind, plan if policy != "plain" else None)
    assert plan.predicted_peak_bytes == pytest.approx(actual, rel=0.01 if policy == "plain" else 0.035)
    prediction = forecast.of(plan)
    process = prediction.peak.parts["process"]
    assert actual <= prediction.peak.high - process
    assert sum(prediction.peak.parts.values()) == prediction.peak.expected
    assert min(prediction.peak.parts.values()) >= 0
    assert prediction.peak.low <= prediction.peak.expected <= prediction.peak.high


class Pair(nn.Module):
    """A block that returns what its own backward reads, which its caller drops."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 512), nn.Linear(512, 64)

    def forward(self, x):
        h = torch.tanh(self.up(x))
        return x + self.down(h), h


class Remembers(nn.Module):
    """A block that leaves a tensor on itself, which the model reads in the end."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 512), nn.Linear(512, 64)
        self.last = None

    def forward(self, x):
        h = self.up(x)
        self.last = torch.tanh(h)
        return x + self.down(h)


class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for _ in range(7))

    def forward(self, x):
        for layer in self.layers:
            found = layer(x)
            x = found[0] if isinstance(found, tuple) else found
        rest = [layer.last.mean() for layer in self.layers if getattr(layer, "last", None) is not None]
        for layer in self.layers:
            if hasattr(layer, "last"):
                layer.last = None
        return x.square().mean() + sum(rest)


@pytest.mark.parametrize("kind", [Pair, Remembers])
def test_blocks_whose_insides_outlive_them(kind):
    """What a block returns and reads again, and what it leaves behind: autograd and others hold it."""
    model, x = Odd(kind), torch.randn(1024, 64)
    predicted = Forecast(Odd(kind), x, optimizer=None)
    plain = switched(predicted.profile, policy="plain", **predicted.named)

    def step():
        model(x).backward()
        for parameter in model.parameters():
            parameter.grad = None

    peaks = [peak(step, model, x) for _ in range(3)]
    assert plain.predicted_peak_bytes == pytest.approx(min(peaks), rel=0.02)


def test_blocks_with_forwards_of_their_own_are_not_passed_over():
    """Between the first two and the last, which agree."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)))

    def twice(self, x):
        return nn.Sequential.forward(self, nn.Sequential.forward(self, x))

    def predict():
        return memfit.simulate(model, torch.zeros(8, 64), loss=lambda output, batch: output.sum())

    once = predict().forward_flops
    for place in (2, 3):
        model[place].forward = twice.__get__(model[place])
    assert predict().forward_flops == once * 8 // 6
    assert all(("forward" in vars(model[i])) == (i in (2, 3)) for i in range(6))


def test_a_model_that_checkpoints_itself_is_predicted_without():
    model = make("llama")
    plain = memfit.simulate(model, batch_for("llama"))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    prediction = memfit.simulate(model, batch_for("llama"))
    assert prediction.peak.low - prediction.peak.parts["process"] == plain.peak.low - plain.peak.parts["process"]
    assert any("own gradient checkpointing" in sentence for sentence in prediction.not_counted)
    assert model.model.layers[0].gradient_checkpointing


def test_a_configuration_is_left_alone():
    config = transformers.BertConfig(**SIZES, intermediate_size=512, num_labels=7)
    before = config.to_dict()
    for task in ("classification", "reranker", "embedder"):
        memfit.simulate(config, task=task, length=16, precision="fp32")
    assert config.to_dict() == before


@pytest.mark.parametrize("name", MODELS)
def test_programs_are_those_of_a_live_recording(name):
    """Key for key: so that a plan made from a prediction holds for the real model."""
    live = memfit.plan(make(name), batch_for(name), policy="full")
    predicted = Forecast(make(name), batch_for(name)).within("min").plan
    assert [(c.name, c.program) for c in predicted.calls] == [(c.name, c.program) for c in live.calls]
    assert predicted.fingerprint == live.fingerprint


def test_a_predicted_plan_trains(tmp_path):
    """From a file, bit for bit."""
    forecast = Forecast(make("llama"), batch_for("llama"))
    smallest, largest = forecast.within("min").plan, forecast.profile
    plain = switched(largest, policy="plain", **forecast.named)
    middle = (smallest.predicted_peak_bytes + plain.predicted_peak_bytes) // 2
    plan = forecast.solve(middle)
    plan.save(tmp_path / "plan.json")
    losses = []
    for given in (None, Plan.load(tmp_path / "plan.json")):
        model = make("llama")
        handle = memfit.apply(model, given) if given is not None else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for _ in range(3):
            torch.manual_seed(7)
            loss = model(**batch_for("llama")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
        if handle is not None:
            assert 0 < handle.summary()["recomputed_bytes"] < plain.saved_bytes
    assert losses[0] == losses[1]


def rehearsed(model, loss, *, doubles=True, optimizer="adamw"):
    """A rehearsal of a fake model, and what it showed."""
    ledger = Ledger(lambda name, flops, moved, dtype: flops / 1e12 + moved / 1e11 + 1e-6)
    with Rehearsal(model, find_blocks(model), ledger, doubles=doubles) as rehearsal, ledger:
        found = rehearsal.run({}, loss, make_optimizer(optimizer, cuda=False))
    return rehearsal, found


@pytest.mark.parametrize("name", MODELS)
def test_equal_blocks_are_passed_over_without_a_trace(name):
    """Everything that a prediction is made of is the same as if each block had run."""
    found = []
    for doubles in (True, False):
        with fake_tensors():
            model = twin(make(name))
            batch = {key: torch.zeros_like(value, device="cpu") for key, value in batch_for(name).items()}
            rehearsal, result = rehearsed(model, lambda m=model, b=batch: m(**b).loss, doubles=doubles)
        found.append(result)
        passed = [call.name for call in rehearsal._calls if call.template is not None]
        assert len(passed) == (2 if doubles else 0)
        assert not rehearsal.differs
        assert all("forward" not in vars(module) for module in model.modules())
    first, second = found
    assert first.profile.events == second.profile.events
    assert first.profile.calls == second.profile.calls
    assert first.profile.programs.keys() == second.profile.programs.keys()
    assert first.forward_flops == second.forward_flops
    assert first.backward_flops == second.backward_flops
    assert first.step_seconds == pytest.approx(second.step_seconds, rel=0.01)
    assert first.gradients == second.gradients


class Layer(nn.Module):
    """One layer of several, which looks up by its place what it does."""

    def __init__(self, acts, place, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.acts, self.layer_idx = acts, place

    def forward(self, x):
        return x + self.down(self.acts[self.layer_idx](self.up(x)))


class Layers(nn.Module):
    def __init__(self, acts, width=32):
        super().__init__()
        self.layers = nn.ModuleList(Layer(acts, place, width) for place in range(len(acts)))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_blocks_that_only_look_equal_are_all_run():
    """They differ in what their place means: the last block is recorded too, and shows it."""
    model = Layers([torch.relu] * 5 + [torch.sigmoid])
    with fake_tensors():
        fake = twin(model)
        x = torch.zeros(4, 32)
        rehearsal, _ = rehearsed(fake, lambda: fake(x))
        assert rehearsal.differs
        _, alone = rehearsed(fake, lambda: fake(x), doubles=False)
    prediction = memfit.simulate(model, torch.zeros(4, 32))
    assert len({call.program for call in prediction.plan.calls}) == 3, "the first one's input needs no gradient"
    assert prediction.forward_flops == alone.forward_flops


@pytest.mark.parametrize("policy", ["plain", "full"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_a_chunked_loss_is_that_of_a_real_step(name, policy):
    """The loss owns the peak of the plain one; its logits are spared, capped ones too."""
    forecast = Forecast(make(name), batch_for(name), chunked_loss=True)
    plan = switched(forecast.profile, policy=policy, **forecast.named)
    actual = measured(name, "full", plan, chunked_loss=True)
    assert plan.predicted_peak_bytes == pytest.approx(actual, rel=0.035)


def test_one_chunk_stands_for_those_like_it(monkeypatch):
    """All but the first and the last, in bytes, FLOPs and seconds."""
    sizes = {**SIZES, "vocab_size": 50257, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    step = {"device": "rtx4090", "batch_size": 5, "length": 511, "precision": "bf16", "chunked_loss": True}
    few = memfit.simulate(config, **step)
    monkeypatch.setattr(chunks, "_CHUNKS", 10**9)
    starts, cut = chunked._starts, []
    monkeypatch.setattr(chunked, "_starts", lambda total, size: cut.append(-(-total // size)) or starts(total, size))
    every = memfit.simulate(config, **step)
    assert cut[0] > 3, "chunks"
    assert max(cut[1:]) > 3, "parts of a chunk"
    assert few.peak == every.peak
    assert few.forward_flops == every.forward_flops
    assert few.step_seconds == pytest.approx(every.step_seconds, rel=1e-9)


class Shifted(transformers.LlamaForCausalLM):
    """Makes of its logits what no chunk can."""

    def forward(self, input_ids, labels):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return self.loss_function(logits=logits - logits[..., :1], labels=labels, vocab_size=VOCABULARY)


def test_what_a_chunked_loss_would_bring():
    sizes = {**SIZES, "vocab_size": 32000, "intermediate_size": 344, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    step = {"device": "rtx4090", "batch_size": 4, "length": 512, "precision": "bf16", "budget": "min"}
    plain = memfit.simulate(config, **step)
    with_it = memfit.simulate(config, **step, chunked_loss=True)
    (offered,) = [each for each in plain.alternatives if "chunked" in each.name]
    assert offered.peak_bytes == with_it.peak.expected < 0.5 * plain.peak.expected
    assert not any("chunked" in each.name for each in with_it.alternatives)
    assert plain.peak.event == "loss"
    for kind in ("Gemma2", "Cohere", "Granite"):  # which cap their logits, or scale them
        config = getattr(transformers, f"{kind}Config")(**sizes, architectures=[f"{kind}ForCausalLM"])
        (offered,) = [each for each in memfit.simulate(config, **step).alternatives if "chunked" in each.name]
        assert offered.peak_bytes < 0.5 * plain.peak.expected
    model, batch = Shifted(transformers.LlamaConfig(**SIZES, use_cache=False)), batch_for("llama")
    assert not any("chunked" in each.name for each in memfit.simulate(model, batch).alternatives)
    with pytest.raises(ModelError, match="cannot be predicted in chunks"):
        memfit.simulate(model, batch, chunked_loss=True)


# FLOPs and time ---------------------------------------------------------------------------------------------------


def test_flops_are_those_that_torch_counts():
    model, batch = make("llama"), batch_for("llama")
    kernels = {  # CPU's, for which torch has no formula
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counted:
        loss = model(**batch).loss
    forward = counted.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=kernels) as counted:
        loss.backward()
    prediction = memfit.simulate(model, batch)
    assert prediction.forward_flops == forward
    assert prediction.backward_flops == counted.get_total_flops()


def test_the_compute_factor():
    """Three forwards where everything trains, four where all is recomputed; what LoRA makes of it."""
    forecast = Forecast(make("llama"), batch_for("llama"))
    plain = forecast.of(switched(forecast.profile, policy="plain", **forecast.named))
    full = forecast.of(switched(forecast.profile, policy="full", **forecast.named))
    lora = Forecast(make("llama", "lora"), batch_for("llama"))
    adapters = lora.of(switched(lora.profile, policy="plain", **lora.named))
    assert plain.compute_factor == pytest.approx(3, abs=0.15)  # attention's backward has five products for two
    # Not four: the head, attention's output and each block's last matmul do not run again.
    assert 3.4 < full.compute_factor < 4
    assert 1.8 < adapters.compute_factor < 2.5
    assert plain.recomputed_flops == 0
    assert full.step_seconds > plain.step_seconds


def test_accumulation_has_gradients_from_the_start():
    once = memfit.simulate(make("llama"), batch_for("llama"), budget="min")
    often = memfit.simulate(make("llama"), batch_for("llama"), budget="min", accumulate=4)
    assert once.peak.parts["gradients"] < often.peak.parts["gradients"]
    assert often.step_seconds > 3 * once.step_seconds
    assert often.peak.low >= once.peak.low


@pytest.mark.parametrize("name", ["adamw", "sgd", "sgd_momentum", "rmsprop", "adagrad"])
def test_optimizer_state_is_that_of_the_real_one(name):
    real = {
        "adamw": lambda p: torch.optim.AdamW(p),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "rmsprop": lambda p: torch.optim.RMSprop(p),
        "adagrad": lambda p: torch.optim.Adagrad(p),
    }[name]
    model = Layers([torch.relu] * 3)
    optimizer = real(list(model.parameters()))
    model(torch.randn(4, 32)).backward()
    optimizer.step()
    state = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    prediction = memfit.simulate(model, torch.zeros(4, 32), optimizer=name)
    assert prediction.peak.parts["optimizer_state"] == state


def test_eight_bit_states_are_a_quarter():
    model = Layers([torch.relu] * 3, width=256)
    sizes = {
        name: memfit.simulate(model, torch.zeros(2, 256), optimizer=name).peak.parts["optimizer_state"]
        for name in ("adamw", "adamw_8bit", "adafactor")
    }
    assert sizes["adamw_8bit"] == pytest.approx(sizes["adamw"] / 4, rel=0.05)
    assert sizes["adafactor"] < 0.02 * sizes["adamw"]


# Another device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "masked", "kernel"),
    [
        (torch.bfloat16, False, "_scaled_dot_product_flash_attention"),
        (torch.bfloat16, True, "_scaled_dot_product_efficient_attention"),
        (torch.float32, False, "_scaled_dot_product_efficient_attention"),
    ],
)
def test_attention_and_dropout_keep_what_they_keep_on_cuda(dtype, masked, kernel):
    names, saved = [], []

    class Names(Ledger):
        def _count(self, func, args, kwargs, out):
            names.append(func._schema.name.removeprefix("aten::"))

    with fake_tensors():
        query = torch.empty(2, 8, 64, 32, dtype=dtype, requires_grad=True)
        key, value = (torch.empty(2, 8, 64, 32, dtype=dtype, requires_grad=True) for _ in range(2))
        mask = torch.ones(2, 1, 64, 64, dtype=torch.bool) if masked else None

        def pack(tensor):
            saved.append((tuple(tensor.shape), tensor.dtype))
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with Names(lambda *_: 0.0), CudaKernels(), hooks:
            found = nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=not masked)
            nn.functional.dropout(found, 0.1).sum().backward()
    assert kernel in names
    assert f"{kernel}_backward" in names
    assert ((2, 8, 64), torch.float32) in saved, "the log-sum-exp"
    assert ((2, 8, 64, 32), torch.bool) in saved, "dropout's mask"
    assert not any(shape == (2, 8, 64, 64) and not masked for shape, _ in saved), "the scores"


def test_a_gpu_need_not_be_there():
    config = transformers.LlamaConfig(**SIZES, intermediate_size=344, num_key_value_heads=2)
    entry = hardware.find("rtx4090")
    prediction = memfit.simulate(config, device=entry, batch_size=4, length=256, precision="bf16")
    assert prediction.fits
    assert prediction.device == "rtx4090"
    assert prediction.peak.parts["process"] == 0
    assert prediction.budget_bytes < entry.memory_bytes
    assert any("no run on one confirms" in sentence for sentence in prediction.not_counted)
    small = replace(entry, memory_bytes=700 * 2**20)
    assert not memfit.simulate(config, device=small, batch_size=64, length=512, precision="bf16").fits


@pytest.mark.parametrize("task", ["causal-lm", "embedder", "reranker", "classification"])
def test_tasks(task):
    sizes = {**SIZES, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(**sizes, intermediate_size=344, num_key_value_heads=2, pad_token_id=0)
    prediction = memfit.simulate(config, task=task, batch_size=2, length=32, precision="fp32")
    assert len({call.name for call in prediction.plan.calls}) == 4
    assert prediction.tokens_per_second > 0
    assert len(prediction.plan.calls) == (8 if task == "embedder" else 4)
    json.dumps(prediction.to_dict(), allow_nan=False)


def test_other_inputs_than_text():
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    vit = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, architectures=["ViTForImageClassification"])
    whisper = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=100,
        max_source_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    for precision in ("fp32", "bf16"):
        assert memfit.simulate(vit, batch_size=2, precision=precision).tokens_per_second is None
        assert memfit.simulate(whisper, batch_size=2, length=16, precision=precision).fits


def test_heads_of_two_sizes_on_cuda():
    """DeepSeek's: values have fewer features than queries, which FlashAttention does not take."""
    with fake_tensors():
        query, key = (torch.empty(1, 4, 16, 192, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        value = torch.empty(1, 4, 16, 128, dtype=torch.bfloat16, requires_grad=True)
        with CudaKernels():
            found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            found.sum().backward()
        assert tuple(found.shape) == (1, 4, 16, 128)
        assert value.grad.shape == value.shape


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gemma-2-2b", "qwen2.5-7b"])
def test_known_models(name):
    """From the table, without a network: their first layers."""
    config = configurations.load(name)
    config.num_hidden_layers = 4
    prediction = memfit.simulate(config, device="h100", length=64, precision="bf16")
    assert len(prediction.plan.calls) == 4
    assert prediction.compute_factor == pytest.approx(3, abs=0.1)


def test_lora_and_autocast_and_frozen_parts():
    config = transformers.LlamaConfig(**SIZES, intermediate_size=344, num_key_value_heads=2)

    def simulate(**options):
        return memfit.simulate(config, batch_size=2, length=64, **options)

    full = simulate(precision="bf16")
    lora = simulate(precision="bf16", lora=4, lora_targets=["q_proj"])
    mixed = simulate(precision="bf16-mixed")
    frozen = simulate(precision="bf16", freeze=["embed_tokens", "layers.0."])
    assert lora.num_trainable == 5 * 4 * (128 + 128)
    assert lora.peak.parts["optimizer_state"] < full.peak.parts["optimizer_state"] / 10
    assert mixed.peak.parts["weights"] == pytest.approx(2 * full.peak.parts["weights"], rel=0.01)
    assert frozen.num_trainable < full.num_trainable


# What cannot be --------------------------------------------------------------------------------------------------


class Chosen(nn.Module):
    """Layers whose shapes depend on values."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x[x.sum(-1) > 0].sum()


def test_errors():
    config = transformers.LlamaConfig(**SIZES, intermediate_size=344, num_key_value_heads=2)
    config.max_position_embeddings = 128
    with pytest.raises(UsageError, match="`seq=256` is beyond the 128 positions"):
        memfit.simulate(config, length=256)
    with pytest.raises(UsageError, match="`batch=0` is not a positive integer"):
        memfit.simulate(config, batch_size=0, length=16)
    with pytest.raises(UsageError, match="no task `chat`"):
        memfit.simulate(config, task="chat", length=16)
    with pytest.raises(UsageError, match="no dtype `int3`"):
        memfit.simulate(config, precision="int3", length=16)
    with pytest.raises(UsageError, match="no optimizer `adamx`"):
        memfit.simulate(config, optimizer="adamx", length=16)
    with pytest.raises(UsageError, match="LoRA found nothing to adapt"):
        memfit.simulate(config, lora=4, lora_targets=["nothing_like_it"], length=16)
    with pytest.raises(UsageError, match="part of no parameter's name"):
        memfit.simulate(config, freeze=["nothing_like_it"], length=16)
    with pytest.raises(UsageError, match="Nearest: `rtx4090`"):
        memfit.simulate(config, device="rtx4091", length=16)
    with pytest.raises(UsageError, match="needs a batch"):
        memfit.simulate(make("llama"))
    with pytest.raises(UsageError, match="makes its own batch"):
        memfit.simulate(config, batch_for("llama"))
    with pytest.raises(UsageError, match="is for configurations"):
        memfit.simulate(make("llama"), batch_for("llama"), lora=4)
    with pytest.raises(UsageError, match="not int"):
        memfit.simulate(3)
    with pytest.raises(ModelError, match="does not run on tensors without contents: DynamicOutputShape"):
        memfit.simulate(Chosen(), torch.zeros(4, 8))
    with pytest.raises(ModelError, match="not a scalar"):
        memfit.simulate(
            nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))), torch.zeros(2, 8)
        )


def test_the_model_is_left_alone():
    """Nothing is computed with it, and nothing is left on it."""
    model, batch = make("llama").eval(), batch_for("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    memfit.simulate(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert transformers.utils.import_utils.is_fake_tensor.__module__.startswith("transformers")
