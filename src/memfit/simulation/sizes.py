"""What formulas for language models read of a step: sizes of the configuration and of the batch."""

from __future__ import annotations

import torch

from memfit.formulas import Sizes
from memfit.simulation.tasks import Job


def sizes_of(job: Job, task: str | None) -> Sizes | None:
    """The sizes, by the names under which DeepSpeed-Chat looks for them; ``None`` where it has no formula for the step.

    Args:
        job: The step.
        task: What it trains for, if anybody knows: the formula is for language models.
    """
    config = getattr(job.model, "config", None)
    ids = job.batch.get("input_ids") if isinstance(job.batch, dict) else None
    if task not in (None, "causal-lm") or not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return None
    num_layers, hidden = _size(config, "num_hidden_layers", "n_layer"), _size(config, "hidden_size", "n_embd")
    vocabulary = _size(config, "vocab_size")
    if num_layers is None or hidden is None or vocabulary is None:
        return None
    ranks = [p.shape[0] for name, p in job.model.named_parameters() if "lora_A" in name and p.dim() == 2]
    return Sizes(
        batch=ids.shape[0],
        length=ids.shape[1],
        num_layers=num_layers,
        hidden=hidden,
        vocabulary=vocabulary,
        lora_rank=ranks[0] if ranks else None,
    )


def _size(config: object, *names: str) -> int | None:
    found = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    return found if isinstance(found, int) and found > 0 else None
