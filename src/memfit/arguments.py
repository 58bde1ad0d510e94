"""What `fit`, `plan` and `apply` were given: refused here, before anything is touched, or never."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch

from memfit.errors import InfeasibleBudgetError, ModelError, UsageError
from memfit.holdings import weight_bytes
from memfit.plans import Plan
from memfit.training import STATE_FACTORS
from memfit.units import format_bytes

POLICIES = ("full", "selective", "plain")

BlockChoice = Iterable[str | torch.nn.Module] | torch.nn.Module
"""Names of modules or classes, or the modules themselves: some, one, or a list of the model's."""

_stays_whole = ContextVar("stays_whole", default=True)


def check_choice(*, budget: object, policy: object, every_n_layers: object, plan: object) -> None:
    """Refuse a choice that says nothing, or two things.

    Raises:
        UsageError: Naming what was given.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise UsageError(f"`plan={_shown(plan)}` is no plan. Read one with `memfit.Plan.load(path)`.")
    named = {"budget": budget, "policy": policy, "every_n_layers": every_n_layers, "plan": plan}
    given = [name for name, value in named.items() if value is not None]
    deciding = {"policy" if name == "every_n_layers" else name for name in given}
    if len(deciding) > 1:
        shown = ["`plan`" if name == "plan" else f"`{name}={_shown(named[name])}`" for name in given]
        raise UsageError(
            f"{' and '.join(shown)} contradict each other: each decides everything. Give one of `budget`, `policy` "
            "(with `every_n_layers`) and `plan`."
        )
    if policy is not None and not callable(policy) and policy not in POLICIES:
        raise UsageError(f"There is no policy `{_shown(policy)}`. Write `full` or `selective`, or give a `budget`.")
    if every_n_layers is not None and (
        isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1
    ):
        raise UsageError(
            f"`every_n_layers={_shown(every_n_layers)}` is not a positive integer. Write 1 for every block, 2 for "
            "every second one."
        )


def check_chunked_loss(chunked_loss: object, *, auto: bool = True) -> bool | Literal["auto"]:
    """Refuse what does not say whether; ``auto``: whether that may be left to the solver.

    Raises:
        UsageError: Naming the value.
    """
    if isinstance(chunked_loss, bool):
        return chunked_loss
    if auto and chunked_loss == "auto":
        return "auto"
    choice = "`True`, `False` or `auto`" if auto else "`True` or `False`"
    raise UsageError(f"`chunked_loss={_shown(chunked_loss)}` is not known here. Write {choice}.")


def check_optimizer(optimizer: object) -> None:
    """Refuse what is neither an optimizer nor the name of one.

    Raises:
        UsageError: Naming the value.
    """
    if optimizer is None or (not isinstance(optimizer, type) and hasattr(optimizer, "param_groups")):
        return
    if isinstance(optimizer, str) and optimizer.lower() in STATE_FACTORS:
        return
    raise UsageError(
        f"`optimizer={_shown(optimizer)}` is not known. Give the optimizer itself, or one of: "
        f"{', '.join(STATE_FACTORS)}."
    )


def check_positive(name: str, value: object) -> None:
    """Refuse what is no count of at least one.

    Raises:
        UsageError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"`{name}={value}` is not a positive integer.")


def check_loss(loss: object) -> None:
    """Refuse what cannot be called with an output and a batch.

    Raises:
        UsageError: Naming the value.
    """
    if loss is None:
        return
    fits = callable(loss)
    if callable(loss):
        try:
            inspect.signature(loss).bind(None, None)
        except TypeError:
            fits = False
        except ValueError:  # a built-in without a signature
            pass
    if not fits:
        raise UsageError(
            f"`loss={_shown(loss)}` cannot be called as `loss(output, batch)`. Give `loss=lambda output, batch: ...`, "
            "or leave it out where the output has a `.loss`."
        )


def read_blocks(model: torch.nn.Module, blocks: BlockChoice | None) -> list[str] | None:
    """The blocks that were asked for, as names.

    Raises:
        UsageError: It is not a list of names or modules, or it is empty.
        ModelError: A module is not one of the model's.
    """
    if blocks is None:
        return None
    if isinstance(blocks, str):
        raise UsageError(f'`blocks="{blocks}"` is one name; it takes a list of them: write `blocks=["{blocks}"]`.')
    if isinstance(blocks, torch.nn.Module) and not isinstance(blocks, torch.nn.ModuleList | torch.nn.Sequential):
        blocks = [blocks]
    if not isinstance(blocks, Iterable):
        raise UsageError(
            f"`blocks={_shown(blocks)}` is not a list. Name modules as `model.named_modules()` does, or classes."
        )
    wanted = list(blocks)
    if not wanted:
        raise UsageError("`blocks` is empty: leave it out, and Memfit finds the blocks itself.")
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str] = []
    for block in wanted:
        name = block if isinstance(block, str) else names.get(id(block))
        if not isinstance(block, str | torch.nn.Module):
            raise UsageError(
                f"`blocks` holds `{_shown(block)}`, which is neither a name nor a module. Name modules as "
                "`model.named_modules()` does, or classes."
            )
        if name is None:
            raise ModelError(
                f"`blocks` holds a {type(block).__name__} that is no part of {type(model).__name__}. Take it from "
                "`model.named_modules()`."
            )
        if not name:
            raise ModelError(
                f"`blocks` names {type(model).__name__} itself. Name modules inside of it, as `model.named_modules()` "
                "does."
            )
        found.append(name)
    return found


def check_model(model: object) -> list[torch.device]:
    """The devices of a model that can be trained, in the order of its parameters.

    Raises:
        ModelError: It is no module, is on the meta device, or has nothing to train.
    """
    if not isinstance(model, torch.nn.Module):
        what = f"the class {model.__name__}: make an instance" if isinstance(model, type) else type(model).__name__
        raise ModelError(f"Memfit fits a torch.nn.Module, not {what}.")
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{name} is TorchScript, which takes no hooks. Fit the module that it was made from.")
    where: dict[torch.device, list[str]] = {}
    for place, parameter in model.named_parameters():
        where.setdefault(parameter.device, []).append(place)
    if not where:
        raise ModelError(f"{name} has no parameters, so there is nothing to train.")
    for device, places in where.items():
        if device.type == "meta":
            total = sum(map(len, where.values()))
            those = "all its parameters" if len(places) == total else f"{len(places)} of its {total} parameters"
            raise ModelError(
                f"{name} has {those} on the meta device, `{places[0]}` for one: they have no values. Load the weights "
                "before `fit`."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            f"{name} has no parameters that train: all are frozen. Set `requires_grad`, or add the adapters, before "
            "`fit`."
        )
    return list(where)


@contextmanager
def before_sharding() -> Iterator[None]:
    """What is fitted in here is sharded before it trains: its whole weights are no reason to refuse a budget."""
    token = _stays_whole.set(False)
    try:
        yield
    finally:
        _stays_whole.reset(token)


def check_static(model: torch.nn.Module, limit: int, optimizer: object, device: torch.device | None = None) -> None:
    """Refuse a budget that is too small before any activation; of several devices that of ``device``.

    Gradients are left out: an optimizer may free each of them in the backward. So is the state of an optimizer that
    nobody named, and weights that will be sharded. All are measured in the first step.

    Raises:
        InfeasibleBudgetError: Naming the parts.
    """
    weights = weight_bytes(model, device)
    name = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
    state = int(STATE_FACTORS.get(name.lower(), 0.0) * _stepped_bytes(model, optimizer, device))
    if isinstance(optimizer, torch.optim.SGD):
        state = _stepped_bytes(model, optimizer, device) if optimizer.defaults.get("momentum") else 0
    if limit >= weights + state or not _stays_whole.get():
        return
    where = "" if device is None else f" on `{device}`"
    parts = f"Weights take {format_bytes(weights)}{where}"
    if state:
        parts += f", {name}'s state {format_bytes(state)}"
    raise InfeasibleBudgetError(
        limit,
        weights + state,
        "weights and optimizer state" if state else "weights",
        f"{parts}; gradients and activations come on top. Train adapters or shard the model, or raise `budget`.",
    )


def _stepped_bytes(model: torch.nn.Module, optimizer: Any, device: torch.device | None) -> int:
    """Of the parameters that an optimizer steps; of all that train, if only its name is known."""
    if optimizer is None:
        return 0
    training = {id(p): p for p in model.parameters() if p.requires_grad and device in (None, p.device)}
    if not isinstance(optimizer, str):
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        training = {key: p for key, p in training.items() if key in stepped}
    return sum(p.numel() * p.element_size() for p in training.values())


def _shown(value: Any) -> str:
    """A value in one short line."""
    text = value if isinstance(value, str) else getattr(value, "__qualname__", None) or repr(value)
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."
