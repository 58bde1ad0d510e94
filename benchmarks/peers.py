"""What people switch on today, and Memfit, each applied to a model by name.

===============  ==========================================================================
``plain``        nothing
``every-N``      Hugging Face checkpointing of every N-th layer
``selective``    torch's selective checkpointing: matmuls and attention saved, the rest recomputed
``memfit``       `memfit.fit` with the given budget
===============  ==========================================================================
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

EVERY = (1, 2, 3, 4, 6)
PEERS = (*(f"every-{n}" for n in EVERY), "selective")


def matmuls_and_attention() -> list[Any]:
    """The ops whose outputs selective checkpointing usually saves, as far as this torch has them."""
    names = (
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    return [getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)]


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated modules that Hugging Face can checkpoint, or the largest `nn.ModuleList` of a plain model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    if found:
        return found
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    prefix, largest = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [(f"{prefix}.{name}", module) for name, module in largest.named_children()]


def checkpoint_layers(model: nn.Module, *, every: int = 1, **kwargs: Any) -> None:
    """Switch on Hugging Face checkpointing for every n-th layer.

    `every_n_layers` is younger than the rest of the interface, and so is the name of the method: where they are missing
    the flags of the layers say the same.
    """
    options = {"use_reentrant": False, **kwargs}
    if hasattr(model, "activation_checkpointing_enable"):
        enable: Any = model.activation_checkpointing_enable
        enable(options, every_n_layers=every)
        return
    enable = model.gradient_checkpointing_enable
    if "every_n_layers" in inspect.signature(enable).parameters:
        enable(options, every_n_layers=every)
        return
    enable(options)
    for index, (_, layer) in enumerate(blocks(model)):
        layer.gradient_checkpointing = index % every == 0  # type: ignore[assignment]


def apply(
    peer: str,
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    budget: int | str | None = None,
    policy: str | None = None,
) -> Any:
    """Switch a peer on.

    Args:
        peer: A name from the table above.
        model: Changed in place.
        optimizer: For Memfit's reservation of its state.
        budget: For ``memfit``.
        policy: For ``memfit``, instead of a budget.

    Returns:
        Memfit's handle, or ``None``.

    Raises:
        ValueError: No such peer.
    """
    if peer == "plain":
        return None
    if peer.startswith("every-"):
        checkpoint_layers(model, every=int(peer.removeprefix("every-")))
        return None
    if peer == "selective":
        from torch.utils import checkpoint

        contexts: Any = checkpoint.create_selective_checkpoint_contexts
        checkpoint_layers(model, context_fn=functools.partial(contexts, matmuls_and_attention()))
        return None
    if peer == "memfit":
        import memfit

        options: dict[str, Any] = {} if policy is None else {"policy": policy}
        return memfit.fit(model, budget=budget, optimizer=optimizer, **options)
    raise ValueError(f"`{peer}` is no peer: `plain`, {', '.join(f'`{name}`' for name in PEERS)} or `memfit`.")
