"""What surrounds a block call: whether somebody else is at work there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd import forward_ad

from memfit import checkpoints, streams

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_hooks_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
_num_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_functorch_active = torch._C._are_functorch_transforms_active


def why_aside(block: torch.nn.Module, called: torch.nn.Module, tensors: Iterable[torch.Tensor]) -> str:
    """Why this call is left alone, or "" (rule 16).

    Args:
        block: The module that was fitted.
        called: The module whose forward runs.
        tensors: Its arguments.
    """
    if called is not block:
        return "a replica of the block runs, with weights of its own"
    on_cuda = False
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_nested:
            return "sparse or nested tensors"
        on_cuda = on_cuda or tensor.is_cuda
    if on_cuda and streams.capturing():
        return "a CUDA graph is captured"
    if checkpointed := checkpoints.reason():
        return checkpointed
    if _top_hooks(True) is not None:
        return "saved-tensor hooks of somebody else are active"
    if _num_modes() > 0:
        return "a torch dispatch mode is active"
    if _tracing_state() is not None:
        return "the model is exported or traced"
    if _functorch_active():
        return "a torch.func transform is active"
    if torch.is_inference_mode_enabled():
        return "inference mode"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if not _hooks_enabled():
        return "saved-tensor hooks are disabled"
    return ""
