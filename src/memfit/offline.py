"""Planning offline: one step is rehearsed on a batch, and the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from memfit.errors import ModelError
from memfit.handle import Handle

Loss = Callable[[Any, Any], torch.Tensor]


def rehearse(handle: Handle, model: torch.nn.Module, batch: Any, loss: Loss | None) -> None:
    """Run one training step of a fitted model, have its handle make a plan of it, and unfit the model.

    Raises:
        InfeasibleBudgetError: No plan fits.
        ModelError: The loss is not a scalar tensor, or no block took part in its backward.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    training = model.training
    parts = handle.parts
    cuda = [device for device in {p.device for p in model.parameters()} if device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=cuda):
            for parameter in parameters:
                parameter.grad = None
            model.train()
            with torch.enable_grad():
                value = scalar_loss(call(model, batch), batch, loss)
                value.backward()  # type: ignore[no-untyped-call]
            del value
            for part in parts:
                part._finish_step()
            if all(part._planning.pending is None for part in parts):
                raise ModelError(f"No block of {type(model).__name__} took part in the backward of this loss.")
            for part in parts:
                part.runtime.calls = []
            for parameter in parameters:
                parameter.grad = None
            for part in parts:
                part._planning.settle()
    finally:
        model.train(training)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        if not handle._removed:
            handle.remove()


def scalar_loss(output: Any, batch: Any, loss: Loss | None) -> torch.Tensor:
    """The loss of one forward.

    Raises:
        ModelError: It is not a scalar tensor.
    """
    value: Any
    if loss is not None:
        value = loss(output, batch)
    else:
        value = getattr(output, "loss", None)
        if value is None:
            value = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        what = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            what = "a scalar that needs no gradient"
        raise ModelError(
            f"The loss is {what}, not a scalar tensor with a gradient. Give `loss=lambda output, batch: ...`."
        )
    return value


def call(model: torch.nn.Module, batch: Any) -> Any:
    """A forward, with a batch as a training loop passes it."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
