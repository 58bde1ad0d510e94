"""Train a few steps and write down everything that a training step leaves behind, bit for bit.

`run_steps` runs a model plain or fitted; what it returns is compared with `assert_bitwise_equal`. The plain run is the
truth, so it must repeat itself: `assert_repeats`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import memfit
from zoo import Batch, Case, Loss, call

Tensors = dict[str, Tensor | None]
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
TrainStep = Callable[[nn.Module, Batch, Loss], Mapping[str, Tensor | None]]


@dataclass(kw_only=True)
class Step:
    """What one optimizer step leaves behind.

    Attributes:
        values: Losses and whatever else the step returned.
        gradients: Of every parameter before the optimizer's step; ``None`` for a parameter without one.
        buffers: After the step: batch norm's statistics among them.
        parameters: After the optimizer's step.
        random: The states of torch's, NumPy's and Python's generators after the step.
    """

    values: Tensors
    gradients: Tensors
    buffers: Tensors
    parameters: Tensors
    random: Tensors


@dataclass(kw_only=True)
class Run:
    """Steps of one training run, and the report of its handle if it was fitted."""

    steps: list[Step] = field(default_factory=list)
    summary: dict[str, Any] | None = None

    @property
    def modes(self) -> dict[str, str]:
        """How blocks ran, their numbers replaced by ``*``: equal blocks of a model run in one way, or both show."""
        return modes(self.summary or {"blocks": []})


def modes(summary: Mapping[str, Any]) -> dict[str, str]:
    """Mode of each kind of block: ``{"model.layers.*": "replay"}``; several modes are joined by ``+``."""
    found: dict[str, set[str]] = {}
    for block in summary["blocks"]:
        name = ".".join("*" if part.isdigit() else part for part in block["name"].split("."))
        found.setdefault(name, set()).add(block["mode"])
    return {name: "+".join(sorted(kinds)) for name, kinds in found.items()}


def seed(value: int = 1234) -> None:
    """Put all three generators that a model may read at a fixed point."""
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def random_state() -> Tensors:
    """States of torch's, NumPy's and Python's generators."""
    _, keys, position, *_ = np.random.get_state()
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {
        **cuda,
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, keys), position]),
        "python": torch.tensor(random.getstate()[1]),
    }


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Every weight moves by about 1% of its size in a step: a recipe with stale weights shows."""
    return torch.optim.AdamW(parameters, lr=3e-3)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Momentum, for models whose gradients Adam's division by tiny variances would drown."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def plain_step(model: nn.Module, batch: Batch, loss: Loss) -> Mapping[str, Tensor | None]:
    """One forward, one backward."""
    value = loss(call(model, batch), batch)
    value.backward()
    return {"loss": value.detach()}


def copies(named: Iterable[tuple[str, Tensor | None]]) -> Tensors:
    """Copies that a later step cannot change."""
    return {name: None if t is None else t.detach().clone() for name, t in named}


def run_steps(
    case: Case,
    *,
    steps: int = 3,
    fit: Mapping[str, Any] | None = None,
    optimizer: Optimizer = adamw,
    train_step: TrainStep = plain_step,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    before_step: Callable[[nn.Module, int], Any] | None = None,
    after: Callable[[Any], Any] | None = None,
) -> Run:
    """Train, and record each optimizer step.

    Args:
        case: Model, batches and loss; the model is changed.
        steps: Optimizer steps.
        fit: Keyword arguments of `memfit.fit`, or ``None`` for the plain run.
        optimizer: Makes the optimizer from the parameters that train.
        train_step: Does the forwards and backwards of one batch and returns what it wants compared.
        autocast: Data type of a CPU autocast region around the forward; the backward runs outside it.
        accumulate: Batches per optimizer step.
        before_step: Called with the model and the index of the step: evaluation, generation, a fault.
        after: Called with the handle after the last step, while the model is still fitted.

    Returns:
        What each step left behind.
    """
    model, loss = case.model, case.loss
    seed()
    opt = optimizer([p for p in model.parameters() if p.requires_grad])
    run = Run()
    handle = None if fit is None else memfit.fit(model, **fit)
    try:
        for i in range(steps):
            if before_step is not None:
                before_step(model, i)
            values: Tensors = {}
            for j in range(accumulate):
                batch = case.batches(i * accumulate + j)
                with autocast_loss(loss, autocast) as (region, inner):
                    found = train_step(region(model), batch, inner)
                values.update({f"{name}.{j}": value for name, value in found.items()})
            gradients = copies((name, p.grad) for name, p in model.named_parameters())
            opt.step()
            opt.zero_grad(set_to_none=True)
            run.steps.append(
                Step(
                    values=copies(values.items()),
                    gradients=gradients,
                    buffers=copies(model.named_buffers()),
                    parameters=copies(model.named_parameters()),
                    random=random_state(),
                )
            )
        if handle is not None:
            run.summary = handle.summary()
            if after is not None:
                after(handle)
    finally:
        if handle is not None:
            handle.remove()
    return run


@contextlib.contextmanager
def autocast_loss(loss: Loss, dtype: torch.dtype | None) -> Any:
    """Yield a wrapper of the model, and the loss, that run under autocast; neither changes if ``dtype`` is ``None``."""
    if dtype is None:
        yield (lambda model: model), loss
        return

    def region(model: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", dtype=dtype):
                return model(*args, **kwargs)

        return forward

    def inner(output: Any, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return loss(output, batch)

    yield region, inner


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers: NaN equals NaN, and minus zero is not zero."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return tensor
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return tensor.contiguous().view(integers[tensor.element_size()])


def difference(actual: Tensor | None, expected: Tensor | None) -> str | None:
    """How two tensors differ, in words, or ``None`` if they do not."""
    if actual is None or expected is None:
        return None if actual is expected else f"{describe(actual)} instead of {describe(expected)}"
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return f"{describe(actual)} instead of {describe(expected)}"
    wrong = bits(actual) != bits(expected)
    if not wrong.any():
        return None
    gap = (actual.double() - expected.double()).abs().nan_to_num(nan=float("inf")).max().item()
    return f"{int(wrong.sum())} of {wrong.numel()} elements differ, by up to {gap:.3g}"


def describe(tensor: Tensor | None) -> str:
    """Data type and shape."""
    return "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def differences(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> list[str]:
    """All differences of two named sets of tensors, names included."""
    found = [f"{name}: missing" for name in expected.keys() - actual.keys()]
    found += [f"{name}: unexpected" for name in actual.keys() - expected.keys()]
    for name in expected.keys() & actual.keys():
        gap = difference(actual[name], expected[name])
        if gap is not None:
            found.append(f"{name}: {gap}")
    return sorted(found)


def run_differences(actual: Run, expected: Run) -> list[str]:
    """All differences of two runs, the first step's first."""
    found = []
    for i, (ours, theirs) in enumerate(zip(actual.steps, expected.steps, strict=True)):
        for what in ("values", "gradients", "buffers", "random", "parameters"):
            found += [f"step {i}, {what}, {line}" for line in differences(getattr(ours, what), getattr(theirs, what))]
    return found


def assert_bitwise_equal(actual: Run | Mapping[str, Any], expected: Run | Mapping[str, Any]) -> None:
    """Fail with the first few differences, counted."""
    if isinstance(actual, Run) and isinstance(expected, Run):
        found = run_differences(actual, expected)
    else:
        assert not isinstance(actual, Run)
        assert not isinstance(expected, Run)
        found = differences(actual, expected)
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:12])


def assert_repeats(run: Callable[[], Run]) -> Run:
    """Run twice; fail if the two runs differ; return one of them."""
    first = run()
    assert_bitwise_equal(run(), first)
    return first
