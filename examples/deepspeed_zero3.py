"""Train a Llama, partitioned by DeepSpeed's ZeRO-3, within a memory budget.

    torchrun --nproc-per-node 2 examples/deepspeed_zero3.py --budget min

Or with DeepSpeed's own launcher, or as one process. On CPU the ranks talk through gloo. The model is small and has
random weights: nothing is downloaded. `--plain` trains without Memfit: the losses are the same, digit for digit.
"""

from __future__ import annotations

import argparse
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import memfit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="min", help="of each rank, such as 6GiB, 80%% or min")
    parser.add_argument("--plain", action="store_true", help="without Memfit")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--local_rank", type=int, help="what DeepSpeed's launcher adds")
    arguments = parser.parse_args()

    if torch.cuda.is_available():
        kind = "cuda"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        kind = "cpu"
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo, instead of compiling an op first
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29511")
    deepspeed.init_distributed()

    torch.manual_seed(0)  # the same weights on every rank
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)

    handle = None if arguments.plain else memfit.fit(model.to(kind), budget=arguments.budget)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        },
    )

    torch.manual_seed(1 + dist.get_rank())  # other data on every rank
    for step in range(arguments.steps):
        ids = torch.randint(0, config.vocab_size, (4, arguments.length), device=kind)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item() / dist.get_world_size():.9f}", flush=True)

    if handle is not None and dist.get_rank() == 0:
        print(handle.report())
    dist.barrier()  # whose connection is gone first ends the others
    engine.destroy()  # what ZeRO-3 has gathered ahead would be freed by gloo's thread while Python shuts down
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
