"""The ways in: `fit` a model while it trains, `plan` on a batch without training, `apply` a plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from memfit.errors import InfeasibleBudgetError, ModelError, UsageError
from memfit.fingerprints import check_plan
from memfit.handle import Handle, fitted_models
from memfit.memory import resolve_budget
from memfit.offline import Loss, rehearse
from memfit.plans import Plan
from memfit.request import PolicyChoice, Request
from memfit.training import STATE_FACTORS


def fit(
    model: torch.nn.Module,
    *,
    budget: int | float | str | None = None,
    policy: PolicyChoice = None,
    every_n_layers: int | None = None,
    blocks: Iterable[str] | None = None,
    optimizer: Any = None,
    plan: Plan | None = None,
) -> Handle:
    """Fit a model's training step into a budget; then train as before.

    The first training step records and measures with the smallest plan; from the second on the best plan holds.

    Args:
        model: Any module with repeated blocks; it stays the user's own, nothing but hooks is added.
        budget: Limit on the peak of the whole process on the model's device: bytes, ``"6GiB"``, ``"6.5 GB"``,
            ``"90%"``, ``"auto"``, ``"min"``; ``None`` saves everything and only measures.
        policy: Without a budget: ``"full"`` or ``"selective"``, today's switches (or a function from a program's
            profile to its policy).
        every_n_layers: Without a budget: ``policy`` (``"full"`` unless given) for every n-th block only.
        blocks: Names of modules or classes to plan for, instead of what is found.
        optimizer: The optimizer, or its name; ``None`` reserves AdamW's state until the first ``optimizer.step()``.
        plan: A plan made before, by `plan`.

    Raises:
        BudgetError: The budget cannot be read.
        ModelError: The model cannot be fitted: no blocks, nothing to train, meta device, fitted already.
        InfeasibleBudgetError: Raised when the second step begins; the model is unfitted then.
        PlanError: The plan is for another model.
    """
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"`fit` takes a torch.nn.Module, not {type(model).__name__}.")
    parts = set(model.modules())
    if any(fitted in parts or model in set(fitted.modules()) for fitted in list(fitted_models)):
        raise ModelError(f"This {type(model).__name__} is fitted already. Call `handle.remove()` on its handle first.")
    chosen = sum(x is not None for x in (budget, policy if policy is not None else every_n_layers, plan))
    if chosen > 1:
        raise UsageError("Give one of `budget`, `policy` (with `every_n_layers`) and `plan`: each decides everything.")
    if isinstance(policy, str) and policy not in ("full", "selective", "plain"):
        raise UsageError(f"There is no policy `{policy}`. Write `full` or `selective`, or give a `budget`.")
    if every_n_layers is not None and (
        isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1
    ):
        raise UsageError(f"`every_n_layers={every_n_layers}` is not a positive integer.")
    if isinstance(optimizer, str) and optimizer.lower() not in STATE_FACTORS:
        raise UsageError(
            f"`optimizer={optimizer}` is not known. Give the optimizer itself, or one of: {', '.join(STATE_FACTORS)}."
        )
    device = _device_of(model)
    limit = resolve_budget(budget, device)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no parameters that train. Set `requires_grad` before `fit`.")
    if isinstance(limit, int):
        static = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        if limit < static:
            raise InfeasibleBudgetError(limit, static, "weights", "Shard the model, or raise `budget`.")
    if plan is not None:
        check_plan(model, plan)
    if every_n_layers is not None and policy is None:
        policy = "full"
    return Handle(
        model,
        budget=limit,
        request=Request(policy=policy, every_n_layers=every_n_layers or 1, plan=plan),
        blocks=list(blocks) if blocks is not None else None,
        optimizer=optimizer,
        device=device,
    )


def apply(model: torch.nn.Module, plan: Plan) -> Handle:
    """Fit a model with a plan that was made before.

    Raises:
        PlanError: The plan is for another model.
        ModelError: As `fit`.
    """
    return fit(model, plan=plan)


def plan(
    model: torch.nn.Module,
    batch: Any,
    *,
    budget: int | float | str | None = None,
    loss: Loss | None = None,
    policy: PolicyChoice = None,
    every_n_layers: int | None = None,
    blocks: Iterable[str] | None = None,
    optimizer: Any = None,
) -> Plan:
    """Profile one training step on a batch and solve for a budget; the model is left as it was.

    Weights, gradients, buffers and the state of torch's generators are the same afterwards.

    Args:
        model: As for `fit`.
        batch: A mapping calls ``model(**batch)``, a tuple ``model(*batch)``, anything else ``model(batch)``.
        budget: As for `fit`. ``None``: save everything.
        loss: ``loss(output, batch)``; by default ``output.loss``, else the output if it is a scalar.
        policy, every_n_layers, blocks, optimizer: As for `fit`.

    Raises:
        InfeasibleBudgetError: No plan fits.
        ModelError: As `fit`; or the loss is not a scalar tensor.
    """
    if budget is None and policy is None and every_n_layers is None:
        policy = "plain"
    handle = fit(model, budget=budget, policy=policy, every_n_layers=every_n_layers, blocks=blocks, optimizer=optimizer)
    rehearse(handle, model, batch, loss)
    assert handle.plan is not None
    return handle.plan


def _device_of(model: torch.nn.Module) -> torch.device:
    devices = list(dict.fromkeys(p.device for p in model.parameters()))
    if any(d.type == "meta" for d in devices):
        raise ModelError(f"{type(model).__name__} is on the meta device. Load its weights before `fit`.")
    if not devices:
        raise ModelError(f"{type(model).__name__} has no parameters.")
    if len(devices) > 1:
        raise ModelError(
            f"{type(model).__name__} lies on several devices: {', '.join(map(str, devices))}. Fit one device's model."
        )
    return devices[0]


__all__ = ["Handle", "apply", "fit", "plan"]
