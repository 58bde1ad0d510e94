"""What tensors hold in a real step, counted one by one: every allocation that torch's profiler saw."""

from __future__ import annotations

import itertools

import torch
from torch.utils._pytree import tree_leaves


def held(*structures) -> int:
    """Bytes of the tensors in models, optimizers and batches, each storage once."""
    tensors = []
    for each in structures:
        if isinstance(each, torch.nn.Module):
            tensors += [*each.parameters(), *each.buffers()]
        elif isinstance(each, torch.optim.Optimizer):
            tensors += [leaf for state in each.state.values() for leaf in state.values()]
        else:
            tensors += tree_leaves(each)
    tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak(step, *structures) -> int:
    """The most bytes that tensors hold in a step, with ``structures`` being there all the time."""
    before = held(*structures)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    found = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return before + max(itertools.accumulate((size for _, size in found), initial=0))


def settled_peak(step, *structures) -> int:
    """The same once states are born and programs are verified; the canary's few large hashes left out."""
    for _ in range(5):
        step()
    return min(peak(step, *structures) for _ in range(2))
