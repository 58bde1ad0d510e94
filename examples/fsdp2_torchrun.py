"""Train a Llama, sharded by FSDP2, within a memory budget.

    torchrun --nproc-per-node 2 examples/fsdp2_torchrun.py --budget min

On CPU the ranks talk through gloo, on GPUs through NCCL. The model is small and has random weights: nothing is
downloaded. `--plain` trains without Memfit: the losses are the same, digit for digit.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import memfit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="min", help="of each rank, such as 6GiB, 80%% or min")
    parser.add_argument("--plain", action="store_true", help="without Memfit")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, reduce in float32")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    arguments = parser.parse_args()

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank = dist.get_rank()

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
    model = LlamaForCausalLM(config).to(kind)

    options = {"mesh": init_device_mesh(kind, (dist.get_world_size(),))}
    if arguments.bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)

    handle = None if arguments.plain else memfit.fit(model, budget=arguments.budget)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    torch.manual_seed(1 + rank)  # other data on every rank
    for step in range(arguments.steps):
        ids = torch.randint(0, config.vocab_size, (4, arguments.length), device=kind)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item() / dist.get_world_size():.9f}", flush=True)

    if handle is not None and rank == 0:
        print(handle.report())
    dist.barrier()  # what Gloo's threads still hold is freed before Python ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
