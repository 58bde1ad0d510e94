"""A training loop of one's own, in a memory budget.

python examples/plain_loop.py                                       # a small model built in place, on the CPU
python examples/plain_loop.py --model Qwen/Qwen3-0.6B --budget 8GiB # a model by its name, from the network
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import memfit

TEXT = [
    "A budget is a promise about memory, made before the first batch is read.",
    "Every tensor that the backward pass asks for must be there, or must be brought back.",
    "Recomputing is cheap where the operation is cheap, and nowhere else.",
    "Two trains leave the same station; only one of them has a driver.",
]


def build(name: str | None) -> torch.nn.Module:
    """The named model, or one with random weights whose tokens are bytes."""
    torch.manual_seed(0)
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=8,
            num_attention_heads=8,
            attention_dropout=0.1,
        )
    )


def batches(name: str | None, size: int) -> list[torch.Tensor]:
    """Token ids, ``size`` texts each."""
    if name is None:
        rows = [(list(text.encode()) * 8)[:256] for text in TEXT]
        ids = torch.tensor(rows)
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
        ids = tokenizer([text * 8 for text in TEXT], truncation=True, max_length=128, return_tensors="pt").input_ids
    return [torch.cat([ids] * -(-size // len(ids)))[:size]]


def main() -> None:
    """Train, then say what was decided, predicted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model of the Hugging Face hub, or a folder")
    parser.add_argument("--budget", default="min", help="6GiB, 90%%, auto or min (the default)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(options.model).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = [batch.to(device) for batch in batches(options.model, options.batch_size)]

    with memfit.fit(model, budget=options.budget, optimizer=optimizer) as handle:
        for step in range(options.steps):
            batch = data[step % len(data)]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: loss {loss.item():.4f}")
        print(handle.report())


if __name__ == "__main__":
    main()
