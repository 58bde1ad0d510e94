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


def check_world(plan: Plan, world_size: int, mesh: tuple[int, ...]) -> None:
    """Refuse a plan for another number of ranks, or for parameters that are sharded in another way.

    Raises:
        PlanError: With both.
    """
    made, here = _world(plan.world_size, plan.mesh), _world(world_size, mesh)
    if made != here:
        raise PlanError(
            f"The plan is for {made}, the model is trained by {here}: "
            "weights, gradients and buckets take other room there. Make a plan where it is to be used, with "
            "`memfit.plan` on every rank or `handle.plan.save(path)` of a run."
        )


def _world(world_size: int, mesh: tuple[int, ...]) -> str:
    ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
    return f"{ranks} that shard it over a mesh of {' x '.join(map(str, mesh))}" if mesh else ranks
