"""Which model a plan is for."""

from __future__ import annotations

from hashlib import sha256

import torch

from memfit.errors import PlanError
from memfit.partitioned import whole_shape
from memfit.plans import Plan
from memfit.sharding import class_name


def fingerprint(model: torch.nn.Module) -> str:
    """Equal for models of equal structure: names, shapes and dtypes of parameters and buffers, and which train."""
    digest = sha256(class_name(model).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {whole_shape(tensor)} {tensor.dtype} {tensor.requires_grad}\n".encode())
    return digest.hexdigest()[:16]


def check_plan(model: torch.nn.Module, plan: Plan) -> None:
    """Refuse a plan for another model.

    Raises:
        PlanError: With both names.
    """
    mine = fingerprint(model)
    if plan.fingerprint != mine:
        raise PlanError(
            f"The plan is for {plan.model} ({plan.fingerprint}), the model is {class_name(model)} ({mine}): names, "
            "shapes or dtypes of parameters differ, or which of them train. Make a plan for this model with "
            "`memfit.plan`."
        )
