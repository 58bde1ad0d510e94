"""LoRA fine-tuning of a language model with TRL's SFTTrainer, in a memory budget.

python examples/llm_lora_trl.py                                       # a small model built in place, on the CPU
python examples/llm_lora_trl.py --model Qwen/Qwen3-0.6B --budget 8GiB # a model by its name, from the network

Needs `pip install trl peft`. The one line of Memfit is the callback.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from memfit.integrations.transformers import MemfitCallback

TEXT = [
    "A budget is a promise about memory, made before the first batch is read.",
    "Every tensor that the backward pass asks for must be there, or must be brought back.",
    "Recomputing is cheap where the operation is cheap, and nowhere else.",
    "Two trains leave the same station; only one of them has a driver.",
] * 16


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are bytes: it needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def build(name: str | None) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The named model and its tokenizer, or a small model with random weights."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config), byte_tokenizer()


def main() -> None:
    """Train, then say what was decided, predicted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model of the Hugging Face hub, or a folder")
    parser.add_argument("--budget", default="min", help="22GiB, 90%%, auto or min (the default)")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()

    model, tokenizer = build(options.model)
    callback = MemfitCallback(budget=options.budget)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=8,
                max_length=128,
                learning_rate=1e-3,
                logging_steps=1,
                bf16=torch.cuda.is_available(),
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict({"text": TEXT}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear"),
            callbacks=[callback],
        )
        trainer.train()
    print(callback.report())


if __name__ == "__main__":
    main()
