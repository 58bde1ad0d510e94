"""The ways in: `fit` a model while it trains, `plan` on a batch without training, `apply` a plan."""

from __future__ import annotations

from typing import Any, Literal

import torch

from memfit.arguments import (
    BlockChoice,
    check_choice,
    check_chunked_loss,
    check_loss,
    check_model,
    check_optimizer,
    check_static,
    read_blocks,
)
from memfit.devices import blocks_by_device, device_of_head, elsewhere
from memfit.errors import ModelError, UsageError
from memfit.fingerprints import check_plan
from memfit.handle import Handle, fitted_models
from memfit.handover import hand_over
from memfit.memory import resolve_budgets
from memfit.offline import Loss, rehearse
from memfit.plans import Plan
from memfit.request import PolicyChoice, Request
from memfit.sharding import unwrapped
from memfit.units import BudgetChoice


def fit(
    model: torch.nn.Module,
    *,
    budget: BudgetChoice = None,
    policy: PolicyChoice = None,
    every_n_layers: int | None = None,
    blocks: BlockChoice | None = None,
    optimizer: Any = None,
    plan: Plan | None = None,
    chunked_loss: bool | Literal["auto"] = False,
) -> Handle:
    """Fit a model's training step into a budget; then train as before.

    The first training step records and measures, and recomputes all it can; from the second on the best plan holds.

    Args:
        model: Any module with repeated blocks; it stays the user's own, nothing but hooks is added. It may be
            wrapped in `DistributedDataParallel` or not yet, sharded by `fully_shard` or not yet.
        budget: Limit on the peak of the whole process on the model's device: bytes, ``"6GiB"``, ``"6.5 GB"``,
            ``"90%"``, ``"auto"``, ``"min"``; ``None`` saves everything and only measures. Where layers are on several
            devices it holds on each of them, or is a mapping such as ``{"cuda:0": "20GiB", "cuda:1": "22GiB"}``.
        policy: Without a budget: ``"full"`` or ``"selective"``, today's switches (or a function from a program's
            profile to its policy).
        every_n_layers: Without a budget: ``policy`` (``"full"`` unless given) for every n-th block only.
        blocks: Names of modules or classes to plan for, or the modules, instead of what is found.
        optimizer: The optimizer, or its name; ``None`` reserves AdamW's state until the first ``optimizer.step()``.
        plan: A plan made before, by `plan`.
        chunked_loss: Compute the loss of a Hugging Face language model in chunks of tokens, so that its logits are
            never there as a whole. It changes the order of sums, and is left out where the report says why.
            ``"auto"``: after the first step, if that saves recomputation, or the budget cannot be held without it.

    Raises:
        BudgetError: The budget cannot be read.
        UsageError: Another argument cannot be read, or two contradict each other.
        ModelError: The model cannot be fitted: no blocks, nothing to train, meta device, fitted already.
        InfeasibleBudgetError: The weights alone are over the budget; or no plan fits, which the first step shows: then
            it is raised when the second step begins, and the model is unfitted.
        PlanError: The plan is for another model; or for other ranks, which the first step shows.
    """
    model = unwrapped(model)
    devices = check_model(model)
    parts = set(model.modules())
    if any(fitted in parts or model in set(fitted.modules()) for fitted in list(fitted_models)):
        raise ModelError(f"This {type(model).__name__} is fitted already. Call `handle.remove()` on its handle first.")
    check_choice(budget=budget, policy=policy, every_n_layers=every_n_layers, plan=plan)
    check_optimizer(optimizer)
    names = read_blocks(model, blocks)
    alone = len(devices) == 1
    split = {} if alone else blocks_by_device(model, names)
    places: dict[torch.device, list[str] | None] = {**split} or {devices[0]: names}
    limits = resolve_budgets(budget, list(places))
    for device, limit in limits.items():
        if isinstance(limit, int):
            check_static(model, limit, optimizer, None if alone else device)
    notes = [] if alone else elsewhere(model, split)
    if plan is not None:
        check_plan(model, plan)
        if plan.device.partition(":")[0] != devices[0].type:
            notes.append(
                f"the plan was made on `{plan.device}`, the model is on `{devices[0]}`: its bytes and times differ"
            )
    if every_n_layers is not None and policy is None:
        policy = "full"
    chunked_loss = check_chunked_loss(chunked_loss)
    head = devices[0] if alone else device_of_head(model, list(places))
    lead: Handle | None = None
    try:
        for device, part in places.items():
            handle = Handle(
                model,
                budget=limits[device],
                request=Request(policy=policy, every_n_layers=every_n_layers or 1, plan=plan, notes=notes),
                blocks=part,
                optimizer=optimizer,
                device=device,
                chunked_loss=chunked_loss if device == head else False,
                alone=alone,
                lead=lead,
            )
            handle.ranks.given = plan
            lead = lead or handle
    except BaseException:
        if lead is not None:
            lead.remove()
        raise
    assert lead is not None, "a model that can be fitted has blocks"
    if not alone:
        blocks_of_all = {name for part in split.values() for name in part}
        order = [name for name, _ in model.named_modules() if name in blocks_of_all]
        for handle in lead.parts:
            handle._request.number(order)  # the n-th block of the model, not of its device
    for handle in lead.parts:
        hand_over(handle, model)
    return lead


def apply(model: torch.nn.Module, plan: Plan) -> Handle:
    """Fit a model with a plan that was made before.

    Raises:
        PlanError: As `fit`.
        ModelError: As `fit`.
    """
    if plan is None:
        raise UsageError("`apply` takes a plan, not None. Read one with `memfit.Plan.load(path)`.")
    return fit(model, plan=plan)


def plan(
    model: torch.nn.Module,
    batch: Any,
    *,
    budget: BudgetChoice = None,
    loss: Loss | None = None,
    policy: PolicyChoice = None,
    every_n_layers: int | None = None,
    blocks: BlockChoice | None = None,
    optimizer: Any = None,
    chunked_loss: bool = False,
) -> Plan:
    """Profile one training step on a batch and solve for a budget; the model is left as it was.

    Weights, gradients, buffers and the state of torch's generators are the same afterwards.

    Args:
        model: As for `fit`.
        batch: A mapping calls ``model(**batch)``, a tuple ``model(*batch)``, anything else ``model(batch)``.
        budget: As for `fit`. ``None``: save everything.
        loss: ``loss(output, batch)``; by default ``output.loss``, else the output if it is a scalar.
        policy, every_n_layers, blocks, optimizer, chunked_loss: As for `fit`.

    Raises:
        InfeasibleBudgetError: No plan fits.
        ModelError: As `fit`; or the loss is not a scalar tensor.
    """
    check_loss(loss)
    check_chunked_loss(chunked_loss, auto=False)
    if budget is None and policy is None and every_n_layers is None:
        policy = "plain"
    handle = fit(
        model,
        budget=budget,
        policy=policy,
        every_n_layers=every_n_layers,
        blocks=blocks,
        optimizer=optimizer,
        chunked_loss=chunked_loss,
    )
    rehearse(handle, model, batch, loss)
    assert handle.plan is not None
    return handle.plan


__all__ = ["Handle", "apply", "fit", "plan"]
