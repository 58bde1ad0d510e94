"""Write what `examples/llamafactory.yaml` trains: a tiny Llama with random weights, its tokenizer, and data.

    python examples/llamafactory_tiny.py [FOLDER]    # `tiny` by default

The data are names of functions of the standard library, and their documentation.
"""

import inspect
import json
import math
import os
import random
import shutil
import statistics
import sys
import textwrap
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def rows():
    """Instructions and answers, as LLaMA-Factory's `alpaca` format has them."""
    for module in (math, os, os.path, random, shutil, statistics, textwrap):
        for name, member in inspect.getmembers(module, callable):
            text = " ".join((inspect.getdoc(member) or "").split())
            if not name.startswith("_") and len(text) > 40:
                yield {"instruction": f"What does `{module.__name__}.{name}` do?", "input": "", "output": text}


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    folder.mkdir(parents=True, exist_ok=True)
    data = list(rows())
    (folder / "docs.json").write_text(json.dumps(data))
    (folder / "dataset_info.json").write_text(json.dumps({"docs": {"file_name": "docs.json"}}))

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator((row["output"] for row in data), trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(folder / "model")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
