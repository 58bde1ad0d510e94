"""Which team devices make, and what a prediction for it leaves out."""

from __future__ import annotations

from typing import Any

import torch

from memfit.hardware import MACHINE_DEVICES, Hardware
from memfit.parallelism import Parallelism
from memfit.simulation.parallel import Replicas, Sharded, Team
from memfit.simulation.split import Groups, Split
from memfit.simulation.traffic import Traffic
from memfit.simulation.zero import Zero
from memfit.simulation.zero3 import Order, Zero3

_HALVES = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


def make_team(
    parallelism: Parallelism,
    entry: Hardware,
    precision: str,
    mesh: Any = None,
    *,
    order: Order | None = None,
    runs_again: bool = False,
) -> Team:
    """What devices add to a rehearsed step; one for each rehearsal.

    Args:
        parallelism: What they do together.
        entry: What each of them is.
        precision: One of `PRECISIONS`.
        mesh: From `process_group`.
        order, runs_again: As `Zero3` takes them.
    """
    if parallelism.kind == "replicas":
        return Team()
    traffic = Traffic(entry, parallelism.num_devices, split_size=parallelism.split_size)
    if parallelism.kind == "ddp":
        return Replicas(traffic)
    if parallelism.kind == "zero" and parallelism.stage == 3:
        return Zero3(parallelism, traffic, order=order, runs_again=runs_again)
    if parallelism.kind == "zero":
        return Zero(parallelism, traffic)
    if parallelism.kind == "tp" and parallelism.num_batches == 1:
        return Split(parallelism, traffic, mesh)
    if parallelism.kind == "tp":  # whose precision is autocast's alone
        return Groups(parallelism, traffic, mesh, None)
    kind = Groups if parallelism.split_size > 1 else Sharded
    return kind(parallelism, traffic, mesh, _HALVES.get(precision))


def notes_of(parallelism: Parallelism, entry: Hardware) -> tuple[str, ...]:
    """What a prediction for several devices leaves out, as sentences."""
    if parallelism.kind == "replicas":
        if parallelism.num_devices == 1:
            return ()
        what = f"What {parallelism.num_devices} devices share: each holds the whole model here, and reduces nothing."
        return (f"{what} Say how they work together: `ddp`, `fsdp` or `zero`.",)
    found = [_note_of_links(parallelism.num_devices, entry)]
    if parallelism.kind == "fsdp":
        found.append(
            "Groups of their own for embedding and head, as torchtitan and accelerate shard them: here they are one "
            "group with all that is outside the blocks, as in torch's documentation, and gathered from forward to "
            "backward."
        )
    if parallelism.kind == "tp" and parallelism.num_batches > 1:
        found.append(
            "Other ways to keep groups of tensor parallel devices alike: here FSDP2 reduces the gradients of whole "
            "copies, as transformers' `dp_replicate_size` does it; DistributedDataParallel takes no DTensors."
        )
    if parallelism.split_size > 1:
        found.append(
            "Parts of blocks: layers of DTensors are outside every recipe, so `fit` runs each block again as a whole, "
            "whatever the budget, and takes no plan file for them. Where `nothing` fits, train without `fit`."
        )
    if parallelism.kind == "zero":
        found.append(
            "DeepSpeed's settings beside its own and `auto`, which makes buckets of hidden size x hidden size "
            "elements: with larger ones, or `overlap_comm`, add what they take."
        )
    if parallelism.kind == "zero" and parallelism.stage == 3:
        found.append(
            "What else ZeRO-3 can be told: offloading, quantized weights, hpZ, leaf modules; it gathers here as `auto` "
            "and its own `stage3_max_reuse_distance` and `stage3_max_live_parameters` have it. On GPUs `overlap_comm`, "
            "which stage 3 has on, also keeps what a stream has not read yet."
        )
        found.append(
            "Keys of ZeRO-3's programs: what DeepSpeed gathers ahead is part of those that ranks record, so they make "
            "their plan themselves. Give them the budget, or `policy=full` for the smallest peak, and no plan file."
        )
    return tuple(found)


def _note_of_links(count: int, entry: Hardware) -> str:
    machines, network = -(-count // MACHINE_DEVICES), entry.network_bytes_per_second
    if entry.interconnect_bytes_per_second is None:
        return f"The time of what devices send each other: `{entry.name}` has no rate for its links."
    if machines == 1:
        return f"Networks between machines: {count} devices are taken to be in one."
    if network is None:
        return (
            f"Networks between machines: `{entry.name}` has no rate for one, so all {count} devices are taken to be "
            "linked as those of one machine are."
        )
    return (
        f"Networks that are slower, or shared: {machines} machines of {MACHINE_DEVICES} devices are taken to be joined "
        f"by {network / 1e9:.3g} GB/s for each device ({entry.sources['network_bytes_per_second']})."
    )


__all__ = ["make_team", "notes_of"]
