"""Gradients, losses, buffers and random state of a fitted model are those of the plain one, to the last bit.

Recomputation changes when a tensor exists, never its value.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradients import Run, TrainStep, assert_bitwise_equal, assert_repeats, plain_step, run_steps, seed, sgd
from policies import keep_everything, link_everything, random_policy
from zoo import (
    HUGGING_FACE,
    NAMES,
    PLAIN_PYTORCH,
    VOCAB,
    Batch,
    Case,
    GPTBlock,
    Loss,
    NanoGPT,
    bert_model,
    build,
    call,
    gpt2_model,
    language,
    llama_model,
    masked_language,
    next_token_loss,
    padded,
    tokens,
    without_cache,
)

FITS: dict[str, dict[str, Any]] = {
    "min": {"budget": "min"},
    "full": {"policy": "full"},
    "selective": {"policy": "selective"},
    "every-2": {"every_n_layers": 2},
    "random": {"policy": random_policy(0)},
    "linked": {"policy": link_everything},
    "save-all": {"policy": keep_everything},
    "measure": {"budget": None},
}
# On models this small the smallest peak is often the optimizer's, and "min" then recomputes nothing from the second
# step on: "full" and "random" always do.
ZOO_FITS = ("min", "full", "random", "linked")
TWO_FITS = ("full", "random")

REPLAY = "replay"
EXPERTS = {
    "model.layers.*": "descent",
    "model.layers.*.input_layernorm": REPLAY,
    "model.layers.*.self_attn": REPLAY,
    "model.layers.*.post_attention_layernorm": REPLAY,
}

# How each model's blocks run. What is not replayed has a reason in the architecture. Experts in a Python loop depend on
# data: which of them run is decided by what the router says. Grouped matrix products take the decision as a tensor.
# Mixtral's router writes its jitter into the input of its experts, so that they cannot run twice.
MODES: dict[str, dict[str, str]] = {
    "gpt2": {"transformer.h.*": REPLAY},
    "llama": {"model.layers.*": REPLAY},
    "qwen3": {"model.layers.*": REPLAY},
    "gemma": {"model.layers.*": REPLAY},
    "phi": {"model.layers.*": REPLAY},
    "falcon": {"transformer.h.*": REPLAY},
    "opt": {"model.decoder.layers.*": REPLAY},
    "bloom": {"transformer.h.*": REPLAY},
    "gpt-neox": {"gpt_neox.layers.*": REPLAY},
    "mixtral": {"model.layers.*": REPLAY},
    "qwen-moe": {"model.layers.*": REPLAY},
    "mamba": {"backbone.layers.*": REPLAY},
    "bert": {"bert.encoder.layer.*": REPLAY},
    "xlm-roberta": {"roberta.encoder.layer.*": REPLAY},
    "deberta-v2": {"deberta.encoder.layer.*": REPLAY},
    "modernbert": {"model.layers.*": REPLAY},
    "electra": {"electra.encoder.layer.*": REPLAY},
    "albert": {"albert.encoder.albert_layer_groups.*.albert_layers.*": REPLAY},
    "t5": {"encoder.block.*": REPLAY, "decoder.block.*": REPLAY},
    "bart": {"model.encoder.layers.*": REPLAY, "model.decoder.layers.*": REPLAY},
    "whisper": {"model.encoder.layers.*": REPLAY, "model.decoder.layers.*": REPLAY},
    "vit": {"vit.layers.*": REPLAY},
    "clip": {"vision_model.encoder.layers.*": REPLAY, "text_model.encoder.layers.*": REPLAY},
    "resnet": {"resnet.encoder.stages.*.layers.*": REPLAY},
    "swin": {"swin.encoder.layers.*.blocks.*": REPLAY, "swin.encoder.layers.*.downsample": REPLAY},
    "nanogpt": {"h.*": REPLAY},
    "residual-net": {"blocks.*": REPLAY},
    "transformer-encoder": {"encoder.layers.*": REPLAY},
    "lstm-stack": {"blocks.*": REPLAY},
    "unet": {"down.*": REPLAY, "up.*": REPLAY},
    "llama-padded": {"model.layers.*": REPLAY},
    "bert-padded": {"bert.encoder.layer.*": REPLAY},
    "llama-eager": {"model.layers.*": REPLAY},
    "bert-eager": {"bert.encoder.layer.*": REPLAY},
    "mixtral-loop": {**EXPERTS, "model.layers.*.mlp": "plain"},
    "qwen-moe-loop": {**EXPERTS, "model.layers.*.mlp": "fallback"},
    "gpt2-shared-block": {"transformer.h.*": REPLAY},
}


@functools.cache
def plain_run(name: str) -> Run:
    """The truth, once per model; fails if it does not repeat itself."""
    return assert_repeats(lambda: run_steps(build(name)))


def test_zoo_is_complete() -> None:
    """The architectures that Memfit promises, and five models that are no Hugging Face models."""
    assert len(HUGGING_FACE) == 25
    assert len(PLAIN_PYTORCH) == 5


@pytest.mark.parametrize("fit", ZOO_FITS)
@pytest.mark.parametrize("name", NAMES)
def test_zoo(name: str, fit: str) -> None:
    """Three optimizer steps, each on new data, with the smallest plan and with plans that keep some of everything."""
    actual = run_steps(build(name), fit=FITS[fit])
    assert_bitwise_equal(actual, plain_run(name))
    assert actual.modes == MODES[name]
    assert actual.summary is not None
    if fit != "min":
        assert actual.summary["recomputed_bytes"] > 0


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5", "llama-padded"])
def test_cache_is_off_in_training(name: str) -> None:
    """A model that asks for its key-value cache trains as one that does not, and has the cache again afterwards."""

    def cached() -> Case:
        case = build(name)
        case.model.config.use_cache = True
        return case

    case = cached()
    assert_bitwise_equal(run_steps(case, fit=FITS["min"]), plain_run(name))
    assert case.model.config.use_cache is True


@pytest.mark.parametrize("fit", sorted(set(FITS) - set(ZOO_FITS)))
@pytest.mark.parametrize("name", ["llama-eager", "mixtral-loop", "t5", "unet"])
def test_switches(name: str, fit: str) -> None:
    """Today's switches are plans like any other."""
    actual = run_steps(build(name), fit=FITS[fit])
    assert_bitwise_equal(actual, plain_run(name))


@pytest.mark.parametrize("policy_seed", range(2, 8))
@pytest.mark.parametrize("name", ["llama-eager", "residual-net"])
def test_many_policies(name: str, policy_seed: int) -> None:
    """A policy is any subset that recipes can start from, not only one that a solver would choose."""
    keep = (0.05, 0.3, 0.7)[policy_seed % 3]
    actual = run_steps(build(name), fit={"policy": random_policy(policy_seed, keep=keep)})
    assert_bitwise_equal(actual, plain_run(name))


def test_longer_run() -> None:
    """Nothing drifts over ten steps, and frames of one step do not leak into the next."""
    expected = run_steps(build("llama-padded"), steps=10)
    assert_bitwise_equal(run_steps(build("llama-padded"), steps=10, fit=FITS["min"]), expected)


# Variants ------------------------------------------------------------------------------------------------------------

LANGUAGE_MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Batch]]] = {
    "gpt2": (gpt2_model, language),
    "llama": (llama_model, language),
    "bert": (bert_model, masked_language),
}

on_two_fits = pytest.mark.parametrize("fit", TWO_FITS)
on_language_models = pytest.mark.parametrize("name", list(LANGUAGE_MODELS))


def language_case(name: str, change: Callable[[nn.Module], nn.Module | None] | None = None, **config: Any) -> Case:
    """A language model with fixed weights; ``change`` may edit it or return another."""
    torch.manual_seed(0)
    make, batches = LANGUAGE_MODELS[name]
    model = without_cache(make(**config))
    if change is not None:
        model = change(model) or model
    return Case(model.train(), batches)


def check(make: Callable[[], Case], fit: str, **options: Any) -> Run:
    """Compare a fitted run with plain ones of the same scenario."""
    expected = assert_repeats(lambda: run_steps(make(), **options))
    actual = run_steps(make(), fit=FITS[fit], **options)
    assert_bitwise_equal(actual, expected)
    return actual


def chosen_and_rejected(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
    """Two forwards of equal shapes with other data; the first loss goes backward last."""
    chosen = loss(call(model, batch), batch)
    other = {**batch, "input_ids": batch["input_ids"].flip(1), "labels": batch["labels"].flip(1)}
    rejected = loss(call(model, other), other)
    rejected.backward()
    chosen.backward()
    return {"chosen": chosen.detach(), "rejected": rejected.detach()}


def with_lora(name: str, *, zero_b: bool = False, **options: Any) -> Callable[[nn.Module], nn.Module]:
    """Adapters with dropout on attention and MLP; B is not zero, as after a while of training."""
    targets = {
        "gpt2": ["c_attn", "c_fc", "c_proj"],
        "llama": ["q_proj", "v_proj", "down_proj"],
        "bert": ["query", "value", "dense"],
    }

    def change(model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=0.2,
            target_modules=targets[name],
            fan_in_fan_out=name == "gpt2",
            **options,
        )
        with warnings.catch_warnings():
            # PEFT asks transformers for a name that transformers is about to drop.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(model, config)
        if not zero_b:
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    nn.init.normal_(parameter, std=0.1)
        return model

    return change


@on_two_fits
@on_language_models
def test_lora(name: str, fit: str) -> None:
    """Adapters train beside frozen weights, and their dropout draws the same numbers again."""
    run = check(lambda: language_case(name, with_lora(name)), fit)
    gradients = run.steps[-1].gradients
    assert all((gradient is not None) == ("lora_" in key) for key, gradient in gradients.items())


@on_two_fits
@on_language_models
def test_lora_from_zero(name: str, fit: str) -> None:
    """While B is zero, an adapter's output proves nothing about what made it: not even a wrong recipe would show."""
    check(lambda: language_case(name, with_lora(name, zero_b=True)), fit, steps=4)


@on_two_fits
@pytest.mark.parametrize("train_step", [plain_step, chosen_and_rejected])
def test_lora_on_experts(fit: str, train_step: TrainStep) -> None:
    """PEFT merges them into the experts' weights in the forward; merged weights come back as any other value."""
    merged = 0

    def make() -> Case:
        nonlocal merged
        from peft import LoraConfig, get_peft_model

        case = build("mixtral")
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        merged = sum(p.nbytes for name, p in case.model.named_parameters() if name.endswith(tuple(experts)))
        torch.manual_seed(1)
        model = get_peft_model(case.model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.1)
        return Case(model.train(), case.batches)

    run = check(make, fit, train_step=train_step)
    assert run.summary is not None
    if fit == "full":
        assert run.summary["saved_bytes"] < merged * (1 if train_step is plain_step else 2)


@on_two_fits
def test_lora_behind_input_gradients(fit: str) -> None:
    """What adapter trainers switch on for checkpointing: a hook that makes the embeddings require gradients."""

    def change(model: nn.Module) -> nn.Module:
        model = with_lora("llama")(model)
        model.enable_input_require_grads()
        return model

    check(lambda: language_case("llama", change), fit)


@on_two_fits
@on_language_models
@pytest.mark.parametrize("frozen", ["below", "above", "middle"])
def test_frozen_layers(name: str, fit: str, frozen: str) -> None:
    """A frozen block saves what its input's gradient needs, or nothing at all."""

    def change(model: nn.Module) -> None:
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
        chosen = {"below": [model.get_input_embeddings(), *blocks[:2]], "above": blocks[1:], "middle": blocks[1:2]}
        for module in chosen[frozen]:
            module.requires_grad_(False)

    check(lambda: language_case(name, change, **({"tie_word_embeddings": False} if frozen == "below" else {})), fit)


@on_two_fits
def test_tied_weights(fit: str) -> None:
    """One matrix in the embedding and the head, one more in two blocks; its gradient hook runs once a backward."""
    calls: list[str] = []

    def change(model: nn.Module) -> None:
        model.model.layers[2].mlp = model.model.layers[0].mlp
        model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
        tied = model.model.layers[0].self_attn.q_proj.weight
        tied.register_hook(lambda gradient: calls.append("gradient"))
        tied.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))

    check(lambda: language_case("llama", change, tie_word_embeddings=True), fit)
    assert len(calls) == 3 * 3 * 2, "three runs, three steps, two hooks"


class IslandBlock(GPTBlock):
    """A block with a region of its own in full precision, as scores, routers and norms often have."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        with torch.autocast("cpu", enabled=False):
            gate = torch.sigmoid(F.linear(x.float(), self.c_proj.weight))
        return x + self.resid_dropout(self.c_out(F.gelu(self.c_fc(self.ln_2(x))))) * gate


def island_case() -> Case:
    """nanoGPT with islands."""
    torch.manual_seed(0)
    model = NanoGPT()
    model.h = nn.ModuleList(IslandBlock() for _ in range(3))
    return Case(model.train(), lambda i: {"args": (tokens(i),)}, next_token_loss)


@on_two_fits
@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "islands"])
def test_autocast(name: str, fit: str) -> None:
    """Under autocast to bfloat16: casts of weights are shared by the region, norms and islands stay in float32."""
    make = island_case if name == "islands" else lambda: language_case(name)
    check(make, fit, autocast=torch.bfloat16)


@on_two_fits
def test_backward_inside_autocast(fit: str) -> None:
    """Discouraged, and common: recipes must not be cast again."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(call(model, batch), batch)
            value.backward()
        return {"loss": value.detach()}

    check(island_case, fit, train_step=train_step)


@on_two_fits
def test_backward_alone_inside_autocast(fit: str) -> None:
    """The forward in float32, the backward in a region that would make everything bfloat16."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        value = loss(call(model, batch), batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value.backward()
        return {"loss": value.detach()}

    check(lambda: language_case("llama"), fit, train_step=train_step)


@on_two_fits
@on_language_models
def test_bfloat16_weights(name: str, fit: str) -> None:
    """Norms that compute in float32 save upcasts of bfloat16: those may be kept in the narrow form."""
    check(lambda: language_case(name, lambda model: model.bfloat16()), fit, optimizer=sgd)


@on_two_fits
def test_float64_weights(fit: str) -> None:
    """As gradient checks do."""
    check(lambda: language_case("llama", lambda model: model.double()), fit)


@on_two_fits
@on_language_models
def test_gradient_accumulation(name: str, fit: str) -> None:
    """Three batches of different lengths per optimizer step."""

    def make() -> Case:
        case = language_case(name)
        _, batches = LANGUAGE_MODELS[name]
        return case._replace(batches=lambda i: batches(i, length=12 - 2 * (i % 3)))

    check(make, fit, accumulate=3)


def two_backwards(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
    """Twice through one graph."""
    value = loss(call(model, batch), batch)
    value.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    value.backward()
    return {"loss": value.detach(), **once}


@on_two_fits
@on_language_models
def test_retain_graph(name: str, fit: str) -> None:
    """A kept graph may be run again."""
    check(lambda: language_case(name), fit, train_step=two_backwards)


def gradient_penalty(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
    """The norm of the gradient is part of the loss."""
    value = loss(call(model, batch), batch)
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, weights, create_graph=True)
    penalty = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    (value + 0.1 * penalty).backward()
    return {"loss": value.detach(), "penalty": penalty.detach()}


@on_two_fits
@on_language_models
def test_double_backward(name: str, fit: str) -> None:
    """Gradients of gradients; flash attention has none, so attention is written out."""
    check(lambda: language_case(name, attn_implementation="eager"), fit, train_step=gradient_penalty)


def test_hessian_vector_product_after_plain_backward() -> None:
    """The first backward keeps the graph, the second differentiates through it."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        value = loss(call(model, batch), batch)
        value.backward(retain_graph=True)
        weights = [model.transformer.h[0].mlp.c_fc.weight, model.transformer.h[2].ln_1.weight]
        gradients = torch.autograd.grad(value, weights, create_graph=True)
        products = torch.autograd.grad(gradients, weights, [torch.ones_like(g) for g in gradients])
        return {"loss": value.detach(), "first": products[0], "second": products[1]}

    check(lambda: language_case("gpt2", attn_implementation="eager"), "min", train_step=train_step)


def query_and_passage(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
    """Two forwards through one encoder, of different lengths, and one backward through both."""
    rows = batch["input_ids"]
    short = model(input_ids=rows[:, :7], output_hidden_states=True).hidden_states[-1].mean(1)
    long = model(input_ids=rows, output_hidden_states=True).hidden_states[-1].mean(1)
    scores = short @ long.T
    value = F.cross_entropy(scores, torch.arange(len(rows)))
    value.backward()
    return {"loss": value.detach(), "scores": scores.detach()}


@on_two_fits
@on_language_models
def test_two_forwards_before_one_backward(name: str, fit: str) -> None:
    """The second forward's frames must not take the place of the first's."""
    check(lambda: language_case(name), fit, train_step=query_and_passage)


@on_two_fits
def test_two_forwards_of_one_shape(fit: str) -> None:
    """Chosen and rejected: one program, two frames."""
    check(lambda: language_case("llama"), fit, train_step=chosen_and_rejected)


@on_two_fits
def test_two_forwards_under_autocast(fit: str) -> None:
    """The second forward meets the casts of weights that the first one made."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first = loss(call(model, batch), batch)
            second = loss(call(model, batch), batch)
        (first + 2 * second).backward()
        return {"first": first.detach(), "second": second.detach()}

    check(lambda: language_case("bert"), fit, train_step=train_step)


@on_two_fits
def test_preferences_with_reference(fit: str) -> None:
    """Preference optimization: the adapters off and no gradients for the reference, then two forwards with them."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        other = {**batch, "input_ids": batch["input_ids"].flip(1), "labels": batch["labels"].flip(1)}
        with torch.no_grad(), model.disable_adapter():
            reference = loss(call(model, batch), batch) - loss(call(model, other), other)
        margin = loss(call(model, batch), batch) - loss(call(model, other), other) - reference
        value = -F.logsigmoid(-margin)
        value.backward()
        return {"loss": value.detach(), "reference": reference}

    check(lambda: language_case("llama", with_lora("llama")), fit, train_step=train_step)


@on_two_fits
def test_graph_kept_over_a_step(fit: str) -> None:
    """The graph of each batch goes backward only after the forward of the next one."""
    waiting: list[Tensor] = []

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        value = loss(call(model, batch), batch)
        waiting.append(value)
        if len(waiting) == 2:
            waiting.pop(0).backward()
        return {"loss": value.detach()}

    def make() -> Case:
        waiting.clear()
        return language_case("gpt2", lambda model: model.requires_grad_(True))

    # The weights must not move while a graph is open: plain autograd would refuse.
    check(make, fit, train_step=train_step, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0), steps=1, accumulate=5)


@on_two_fits
@on_language_models
def test_evaluation_between_steps(name: str, fit: str) -> None:
    """Evaluation in both modes, with and without gradients, gives what a plain model gives, and disturbs nothing."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        values = dict(plain_step(model, batch, loss))
        with torch.no_grad():
            values["dropout on"] = loss(call(model, batch), batch)
        model.eval()
        with torch.no_grad():
            values["no_grad"] = loss(call(model, batch), batch)
        with torch.inference_mode():
            values["inference"] = loss(call(model, batch), batch).clone()
        values["eval with gradients"] = loss(call(model, batch), batch)
        model.train()
        return values

    check(lambda: language_case(name), fit, train_step=train_step)


@on_two_fits
def test_evaluation_inside_a_step(fit: str) -> None:
    """Between forward and backward: the open graph is not touched."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        value = loss(call(model, batch), batch)
        model.eval()
        with torch.no_grad():
            evaluated = loss(call(model, batch), batch)
        model.train()
        value.backward()
        return {"loss": value.detach(), "evaluated": evaluated}

    check(lambda: language_case("llama"), fit, train_step=train_step)


@on_two_fits
def test_training_in_evaluation_mode(fit: str) -> None:
    """Gradients with dropout off: Hugging Face's own checkpointing silently does nothing here."""
    run = check(lambda: language_case("bert", lambda model: model.eval()), fit)
    assert set(run.modes.values()) == {REPLAY}


@on_two_fits
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_between_steps(name: str, fit: str) -> None:
    """Sampling with a key-value cache, as reinforcement learning does at every step."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        model.eval()
        prompt = batch["input_ids"][:, :4]
        text = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=True
        )
        model.train()
        batch = {"input_ids": text, "labels": text.clone()}
        return {**plain_step(model, batch, loss), "text": text}

    check(lambda: language_case(name), fit, train_step=train_step)


@on_two_fits
@on_language_models
def test_changing_shapes(name: str, fit: str) -> None:
    """Longer, shorter, wider, and at last a batch of one."""
    shapes = [(2, 12), (2, 7), (2, 12), (3, 16), (1, 12)]

    def make() -> Case:
        case = language_case(name)
        _, batches = LANGUAGE_MODELS[name]
        return case._replace(batches=lambda i: batches(i, batch=shapes[i][0], length=shapes[i][1]))

    check(make, fit, steps=5)


@on_two_fits
@on_language_models
def test_changing_padding(name: str, fit: str) -> None:
    """Masks that pad otherwise at every step, and none at every third."""

    def make() -> Case:
        case = language_case(name)
        _, batches = LANGUAGE_MODELS[name]
        return case._replace(batches=lambda i: padded(batches(i), i))

    check(make, fit, steps=5)


@on_two_fits
def test_gradient_of_the_input(fit: str) -> None:
    """Embeddings come from outside and want a gradient: adversarial training, prompt tuning."""
    found: list[Tensor] = []

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        value = model(inputs_embeds=embeddings, labels=batch["labels"]).loss
        value.backward()
        found.append(embeddings.grad)
        return {"loss": value.detach(), "input": embeddings.grad}

    check(
        lambda: language_case("llama", tie_word_embeddings=False),
        fit,
        train_step=train_step,
        optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1),
    )
    assert all(gradient.any() for gradient in found)


@on_two_fits
def test_partial_backwards(fit: str) -> None:
    """Gradients of some weights, then of others: each backward stops early and asks for other saved tensors."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        value = loss(call(model, batch), batch)
        blocks = model.model.layers
        (top,) = torch.autograd.grad(value, [blocks[2].mlp.up_proj.weight], retain_graph=True)
        value.backward(inputs=[blocks[1].mlp.up_proj.weight], retain_graph=True)
        (bottom,) = torch.autograd.grad(value, [blocks[0].self_attn.q_proj.weight], retain_graph=True)
        value.backward()
        return {"loss": value.detach(), "top": top, "bottom": bottom}

    check(lambda: language_case("llama"), fit, train_step=train_step)


@on_two_fits
def test_hidden_states_in_the_loss(fit: str) -> None:
    """Distillation: every block's output is held by the caller and enters the loss."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        value = output.loss + sum(h.square().mean() for h in output.hidden_states)
        value = value + sum(a.square().mean() for a in output.attentions)
        value.backward()
        return {"loss": value.detach()}

    check(lambda: language_case("bert", attn_implementation="eager"), fit, train_step=train_step)


@on_two_fits
def test_unused_outputs(fit: str) -> None:
    """An early exit: the last block runs, and nothing of it reaches the loss."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        value = model(**batch, output_hidden_states=True).hidden_states[2].square().mean()
        value.backward()
        return {"loss": value.detach()}

    check(lambda: language_case("llama"), fit, train_step=train_step)


@on_two_fits
def test_forward_without_backward(fit: str) -> None:
    """A loss that is dropped, as after an overflow, leaves nothing behind that the next step could meet."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        dropped = loss(call(model, batch), batch).detach()
        return {"dropped": dropped, **plain_step(model, batch, loss)}

    check(lambda: language_case("gpt2"), fit, train_step=train_step)


@on_two_fits
def test_not_a_number(fit: str) -> None:
    """NaN and infinity pass through like any other bits."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        embeddings = model.get_input_embeddings()(batch["input_ids"]).clone()
        with torch.no_grad():
            embeddings[0, 0, 0] = float("nan")
            embeddings[1, 1, 1] = float("inf")
        value = model(inputs_embeds=embeddings, labels=batch["labels"]).loss
        value.backward()
        return {"loss": value.detach()}

    case = functools.partial(language_case, "gpt2")
    run = check(case, fit, train_step=train_step, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0))
    assert run.steps[-1].values["loss.0"].isnan()


@on_two_fits
def test_hooks_on_gradients(fit: str) -> None:
    """Hooks of the user on parameters, outputs and modules run as often as in a plain step, with the same gradients."""
    seen: list[Tensor] = []

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        seen.clear()
        values = dict(plain_step(model, batch, loss))
        return {**values, **{f"seen {i}": t for i, t in enumerate(seen)}}

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: seen.append(gradient.clone()))

    def change(model: nn.Module) -> None:
        model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
        model.model.layers[1].register_full_backward_hook(lambda m, into, out: seen.append(into[0].clone()))
        model.model.layers[2].mlp.register_full_backward_hook(lambda m, into, out: seen.append(out[0].clone()))
        model.model.layers[2].register_forward_hook(watch)

    check(lambda: language_case("llama", change), fit, train_step=train_step)
    assert len(seen) == 4


@on_two_fits
def test_gradient_clipping_and_scaling(fit: str) -> None:
    """The whole tail of a training loop."""

    def train_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor]:
        value = loss(call(model, batch), batch)
        (value * 1024.0).backward()
        for p in model.parameters():
            p.grad.div_(1024.0)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        return {"loss": value.detach(), "norm": norm}

    check(lambda: language_case("gpt2"), fit, train_step=train_step)


@on_two_fits
def test_empty_batch(fit: str) -> None:
    """No rows at all, between two batches that have some."""

    def make() -> Case:
        torch.manual_seed(0)
        sizes = [2, 2, 0, 2]
        batches = {i: {"args": (tokens(i, batch=n),)} for i, n in enumerate(sizes)}
        return Case(NanoGPT().train(), batches.__getitem__, lambda logits, batch: logits.square().sum())

    check(make, fit, steps=4)


def test_policies_differ() -> None:
    """The random policies above drop something, keep something, and are not all the same."""
    shares = []
    for policy_seed in range(3):
        run = run_steps(build("llama-eager"), fit={"policy": random_policy(policy_seed)})
        assert run.summary is not None
        assert run.summary["recomputed_bytes"] > 0
        assert run.summary["saved_bytes"] > 0
        shares.append(run.summary["saved_bytes"])
    assert len(set(shares)) == 3


def test_seed_is_complete() -> None:
    """The harness puts back every generator that a model may read: else two plain runs would differ by luck."""
    from gradients import random_state

    seed()
    first = random_state()
    torch.rand(3), torch.randn(VOCAB)
    seed()
    assert_bitwise_equal(random_state(), first)
