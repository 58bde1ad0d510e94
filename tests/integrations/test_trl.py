"""TRL's trainers with `MemfitCallback`: two forwards before one backward, generation between updates."""

from __future__ import annotations

import shlex

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    TrlParser,
)

from memfit import stacks
from memfit.integrations.transformers import MemfitCallback
from training import (
    SHORT_RUN,
    TEXT,
    assert_example_runs,
    assert_less_is_alive,
    assert_planned,
    assert_same_weights,
    assert_script_is_fitted,
    assert_untouched,
    history,
    llama,
    metered,
    save_tokenizer,
    weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """With a model beside it on disk: DPO and GRPO load their reference from where the model came from."""
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def policy(tokenizer):
    return LlamaForCausalLM.from_pretrained(tokenizer.name_or_path)


def language():
    return Dataset.from_dict({"text": TEXT})


def preferences():
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in TEXT]
    return Dataset.from_dict(
        {
            "prompt": [first for first, _ in halves],
            "chosen": [second for _, second in halves],
            "rejected": [second[::-1] for _, second in halves],
        }
    )


def prompts():
    return Dataset.from_dict({"prompt": [text[:12] for text in TEXT]})


def vowels(completions, **kwargs):
    """A reward that differs between completions."""
    return [float(sum(letter in "aeiou" for letter in text)) - 0.1 * len(set(text)) for text in completions]


def scorer(tokenizer):
    config = policy(tokenizer).config
    config.num_labels = 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


STACKS = {
    "sft": (SFTTrainer, SFTConfig, policy, language, {"max_length": 48}),
    "dpo": (DPOTrainer, DPOConfig, policy, preferences, {"max_length": 64}),
    "reward": (RewardTrainer, RewardConfig, scorer, preferences, {"max_length": 128}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        policy,
        prompts,
        {"num_generations": 2, "max_completion_length": 8, "beta": 0.04, "per_device_train_batch_size": 4},
    ),
}


def trained(name, folder, tokenizer, callback=None, *, peft=None, **changes):
    trainer_class, config_class, build, data, own = STACKS[name]
    options = {**SHORT_RUN, "max_steps": 4, "bf16": False}
    extra = {"reward_funcs": vowels} if name == "grpo" else {}
    trainer = trainer_class(
        model=build(tokenizer),
        args=config_class(str(folder), **{**options, **own, **changes}),
        train_dataset=data(),
        processing_class=tokenizer,
        callbacks=[callback] if callback is not None else [],
        peft_config=peft,
        **extra,
    )
    metered(trainer).train()
    return trainer


def comparable(trainer):
    """Its log without times and our own metrics."""
    return [
        {
            key: value
            for key, value in entry.items()
            if not key.startswith(("memfit/", "step_time")) and "runtime" not in key and "per_second" not in key
        }
        for entry in trainer.state.log_history
    ]


def assert_the_same(plain, fitted, callback):
    assert len(history(plain)) == 4
    assert len({str(value) for value in history(plain, "grad_norm")}) > 1
    assert history(fitted) == history(plain)
    assert str(comparable(fitted)) == str(comparable(plain))  # NaN equals NaN here
    assert_same_weights(weights(fitted.model), weights(plain.model))
    assert_planned(callback.summary())
    assert_less_is_alive(fitted, plain)
    assert_untouched(fitted.model)
    assert history(fitted, "memfit/overhead")


def lora():
    return LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", STACKS)
def test_losses_and_weights_are_the_same(tmp_path, tokenizer, name, adapter, checkpointed):
    """TRL turns checkpointing on unless it is told not to."""

    def run(callback, checkpointed):
        peft = None
        if adapter:
            torch.manual_seed(2)
            peft = lora()
        return trained(name, tmp_path, tokenizer, callback, peft=peft, gradient_checkpointing=checkpointed)

    callback = MemfitCallback(budget="min")
    assert_the_same(run(None, False), run(callback, checkpointed), callback)
    notes = callback.summary()["notes"]
    assert any("_checkpointing=True` was taken over" in note for note in notes) == checkpointed


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_mixed_precision_and_accumulation(tmp_path, tokenizer, name):
    """TRL's defaults: bfloat16 by autocast, checkpointing on."""
    changes = {"bf16": True, "gradient_accumulation_steps": 2}
    callback = MemfitCallback(budget="min")
    plain = trained(name, tmp_path, tokenizer, gradient_checkpointing=False, **changes)
    assert_the_same(plain, trained(name, tmp_path, tokenizer, callback, **changes), callback)


def test_several_iterations_over_one_generation(tmp_path, tokenizer):
    changes = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4}
    callback = MemfitCallback(budget="min")
    plain = trained("grpo", tmp_path, tokenizer, gradient_checkpointing=False, **changes)
    assert_the_same(plain, trained("grpo", tmp_path, tokenizer, callback, **changes), callback)


def test_selective_checkpointing_is_taken_over(tmp_path, tokenizer):
    callback = MemfitCallback(budget="min")
    plain = trained("sft", tmp_path, tokenizer, gradient_checkpointing=False)
    fitted = trained("sft", tmp_path, tokenizer, callback, gradient_checkpointing_kwargs={"selective": True})
    assert_the_same(plain, fitted, callback)
    assert any(note.startswith("`selective=True` was taken over") for note in callback.summary()["notes"])


def test_selective_checkpointing_without_a_budget(tmp_path, tokenizer):
    callback = MemfitCallback()
    plain = trained("sft", tmp_path, tokenizer, gradient_checkpointing=False)
    fitted = trained("sft", tmp_path, tokenizer, callback, gradient_checkpointing_kwargs={"selective": True})
    assert_the_same(plain, fitted, callback)
    assert callback.summary()["saved_bytes"] > 0


@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_activation_offloading_is_taken_over(tmp_path, tokenizer, name):
    """It is a context of TRL around the step: beside it, Memfit would have to step aside.

    The real one wants a GPU when it is made. One with the same kind of hooks takes its place.
    """
    entered = []

    class Offloading(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self):
            super().__init__(lambda tensor: tensor, lambda tensor: tensor)

        def __enter__(self):
            entered.append(self)
            return super().__enter__()

    class Trainer(STACKS[name][0]):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.maybe_activation_offload_context = self.own = Offloading()

    stack = (Trainer, *STACKS[name][1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STACKS, name, stack)
        callback = MemfitCallback(budget="min")
        plain = trained(name, tmp_path, tokenizer, gradient_checkpointing=False)
        assert len(entered) == 4
        fitted = trained(name, tmp_path, tokenizer, callback)
    assert len(entered) == 4
    assert_the_same(plain, fitted, callback)
    assert fitted.maybe_activation_offload_context is fitted.own
    assert any(note.startswith("`activation_offloading=True` was taken over") for note in callback.summary()["notes"])


def test_evaluation_between_updates(tmp_path, tokenizer):
    seen = []
    for callback in (None, MemfitCallback(budget="min")):
        trainer = DPOTrainer(
            model=policy(tokenizer),
            args=DPOConfig(
                str(tmp_path),
                max_steps=4,
                eval_strategy="steps",
                eval_steps=1,
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                per_device_train_batch_size=4,
                logging_steps=1,
            ),
            train_dataset=preferences(),
            eval_dataset=preferences(),
            processing_class=tokenizer,
            callbacks=[callback] if callback is not None else [],
        )
        trainer.train()
        seen.append((history(trainer, "eval_loss"), history(trainer)))
    assert len(seen[0][0]) == 4
    assert seen[0] == seen[1]
    assert_planned(callback.summary())


def test_the_example_runs_as_it_stands(tmp_path):
    assert_example_runs(tmp_path, "llm_lora_trl.py")


SCRIPT = """
import sys
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

torch.set_num_threads(1)
torch.manual_seed(2)
arguments = SFTConfig(
    "out", max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
    bf16=False, max_length=48, save_strategy="no", gradient_checkpointing_kwargs={"every_n_layers": 2},
)
trainer = SFTTrainer(
    model=LlamaForCausalLM.from_pretrained(%r),
    args=arguments,
    train_dataset=Dataset.from_dict({"text": %r}),
    processing_class=AutoTokenizer.from_pretrained(%r),
    peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"], init_lora_weights=False),
)
trainer.train()
print([entry["loss"].hex() for entry in trainer.state.log_history if "loss" in entry])
"""


def test_an_unmodified_script(tmp_path, tokenizer):
    folder = tokenizer.name_or_path
    summary = assert_script_is_fitted(tmp_path, SCRIPT % (folder, TEXT, folder))
    assert any("was told to checkpoint its activations" in note for note in summary["notes"])
    assert any(note.startswith("`every_n_layers=2` was taken over") for note in summary["notes"])


def test_the_lines_that_a_plan_prints_are_its_arguments(tmp_path):
    """`memfit plan --for trl`: every line is read by the configuration of the trainers that it is for."""
    for setting in stacks.find("trl").settings:
        words = [word for line in setting.paste(3) for word in shlex.split(line)]
        for config in (SFTConfig,) if setting.kind == "attention" else (SFTConfig, DPOConfig, RewardConfig):
            parser = TrlParser((config,))
            (arguments,) = parser.parse_args_and_config(["--output_dir", str(tmp_path), "--use_cpu", "True", *words])
            assert arguments.gradient_checkpointing is (setting.kind != "nothing")
            assert arguments.activation_offloading is (setting.kind == "offload")
            kwargs = arguments.gradient_checkpointing_kwargs or {}
            assert kwargs.get("every_n_layers") == (3 if setting.kind == "every_n" else None)
            assert kwargs.get("selective") == (True if setting.kind == "attention" else None)
