"""Run one scenario plain and fitted, and hold the fitted one to the plain one.

The rule: never a wrong gradient where plain autograd is right, never silence where it raises. A scenario trains a model
and writes what it sees into a dict; it is told how to fit the model, and does not know whether that does anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import memfit
from gradients import Tensors, copies, differences, random_state, seed
from policies import link_everything, random_policy

SMALLEST: dict[str, dict[str, Any]] = {"min": {"budget": "min"}}
"""Differs from the others in step one, which it measures; later it may recompute nothing: the peak is elsewhere."""

FITS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "random": {"policy": random_policy(3, keep=0.3)},
    "linked": {"policy": link_everything},
}

Fit = Callable[[nn.Module], "memfit.Handle | None"]
Scenario = Callable[[Fit, Tensors], None]


@dataclass(kw_only=True)
class Outcome:
    """What a scenario saw, and how it ended."""

    seen: Tensors = field(default_factory=dict)
    error: BaseException | None = None
    summary: dict[str, Any] | None = None


def attempt(scenario: Scenario, options: Mapping[str, Any] | None) -> Outcome:
    """Run a scenario to its end or its error; the model is unfitted afterwards either way."""
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        handles: list[Any] = []

        def fit(model: nn.Module) -> Any:
            if options is None:
                return None
            handle = memfit.fit(model, **options)
            stack.callback(handle.remove)
            handles.append(handle)
            return handle

        seed()
        torch.manual_seed(0)
        try:
            scenario(fit, outcome.seen)
        except (Exception, KeyboardInterrupt) as error:
            outcome.error = error.with_traceback(None)
        if handles and outcome.error is None:
            outcome.summary = handles[0].summary()
        outcome.seen.update({f"random {name}": state for name, state in random_state().items()})
    return outcome


def hold(
    scenario: Scenario, *, refusal: bool = False, fits: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Outcome]:
    """Compare a fitted run of a scenario with a plain one.

    Args:
        scenario: What happens.
        fits: Arguments of `memfit.fit`, by name; each is held to the same plain run.
        refusal: Whether a `MemfitError` may take the place of equal bits: a plan cannot see what plain autograd sees.

    Returns:
        How the fitted runs went, by name.
    """
    plain, again = attempt(scenario, None), attempt(scenario, None)
    assert type(plain.error) is type(again.error)
    assert not differences(again.seen, plain.seen), "the plain scenario does not repeat itself"
    outcomes: dict[str, Outcome] = {}
    failures: list[str] = []
    for name, options in (FITS if fits is None else fits).items():
        outcomes[name] = attempt(scenario, options)
        try:
            judge(outcomes[name], plain, refusal=refusal)
        except AssertionError as failure:
            failures.append(f"{name}: {failure}")
    assert not failures, "\n".join(failures)
    return outcomes


def judge(fitted: Outcome, plain: Outcome, *, refusal: bool) -> None:
    """Fail if the fitted run is wrong or silent where the plain run is not."""
    if plain.error is not None:
        assert fitted.error is not None, f"silent where plain autograd raises {plain.error!r}"
        compare(fitted, plain)
        return
    if fitted.error is not None:
        # A refusal is deliberate, and comes before a wrong gradient could be used: all that was seen is right.
        assert refusal, f"{fitted.error!r} where plain autograd is right"
        assert isinstance(fitted.error, memfit.MemfitError), f"not a deliberate error: {fitted.error!r}"
        compare(fitted, plain)
        return
    compare(fitted, plain)
    assert fitted.seen.keys() == plain.seen.keys()


def compare(fitted: Outcome, plain: Outcome) -> None:
    """Everything that the fitted run saw before it ended is what the plain run saw."""
    stopped = fitted.error is not None
    names = [name for name in fitted.seen if not (stopped and name.startswith("random "))]
    found = differences({n: fitted.seen[n] for n in names}, {n: plain.seen[n] for n in names if n in plain.seen})
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:12])


WIDTH = 32
ROWS = 6


class Block(nn.Module):
    """Norm, projection, activation, scale, projection, dropout, residual: everything that a fault may aim at."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act = nn.SiLU()
        self.dropout = nn.Dropout(0.1)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(self.norm(x))) * self.scale
        return x + self.dropout(self.down(h.sigmoid() * h))


class Stack(nn.Module):
    """Three blocks and a head; returns the loss. ``between`` is called with what passes from block to block."""

    def __init__(self, make: Callable[[], nn.Module] = Block, count: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(count))
        self.head = nn.Linear(WIDTH, 7)
        self.between: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.between is not None:
                x = self.between(x)
        return self.head(x).tanh().square().mean()


class Watched(Stack):
    """Keeps what passes between its blocks within reach of the test."""

    def forward(self, x: Tensor) -> Tensor:
        self.passed = [x]
        for block in self.blocks:
            x = block(x)
            self.passed.append(x)
        return self.head(x).tanh().square().mean()


class OverwritesInput(torch.autograd.Function):
    """Saves its input and uses that memory for the gradient, as fused losses and activations do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x.data.tanh_().square_().neg_().add_(1).mul_(gradient)
        return x.detach().clone()


def data(i: int, *, rows: int = ROWS, width: int = WIDTH) -> Tensor:
    """The input of step ``i``."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(100 + i))


def train(
    model: nn.Module,
    fit: Fit,
    seen: Tensors,
    *,
    steps: int = 5,
    between: Callable[[Any, int], object] | None = None,
    inside: Callable[[Any, int], object] | None = None,
    forward: Callable[[Any, Tensor], Tensor] | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
    must_drop: bool = True,
) -> None:
    """Train for some steps and write down losses, gradients, buffers and parameters of each.

    Args:
        model: Returns its loss.
        fit: Fits it, or does nothing.
        seen: Is filled.
        steps: Optimizer steps; the plan is active from the second on.
        between: Called before the forward of step ``i``.
        inside: Called between forward and backward of step ``i``.
        forward: Computes the loss from model and input.
        backward: Runs the backward of the loss.
        must_drop: Whether a fitted run that recomputes nothing fails: a fault that meets no plan proves nothing.
    """
    model.train()
    handle = fit(model)
    for i in range(steps):
        if between is not None:
            between(model, i)
        x = data(i).requires_grad_()
        loss = model(x) if forward is None else forward(model, x)
        if inside is not None:
            inside(model, i)
        backward(loss)
        if handle is not None and must_drop and i == 1:
            summary = handle.summary()
            assert summary["recomputed_bytes"] > 0, f"nothing is recomputed: {summary['blocks']}"
        seen[f"{i} loss"] = loss.detach()
        seen[f"{i} input"] = None if x.grad is None else x.grad.clone()
        seen.update(copies((f"{i} gradient {name}", p.grad) for name, p in model.named_parameters()))
        seen.update(copies((f"{i} buffer {name}", b) for name, b in model.named_buffers()))
        # A new optimizer each time: faults may put other parameters in the place of those that there were.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        optimizer.step()
        optimizer.zero_grad()
        seen.update(copies((f"{i} parameter {name}", p) for name, p in model.named_parameters()))


def at(step: int, action: Callable[[Any], object]) -> Callable[[Any, int], object]:
    """Do something to the model in one step only."""
    return lambda model, i: action(model) if i == step else None
