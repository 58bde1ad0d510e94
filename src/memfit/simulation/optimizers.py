"""The optimizers that a step may end with, on fake parameters: their state, and what their step needs beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from memfit.errors import UsageError

_BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit states
_MIN_8BIT = 4096  # parameters with fewer keep 32 bits there


def make_optimizer(name: str, *, cuda: bool) -> Callable[[Sequence[torch.Tensor]], Any]:
    """The optimizer of that name; on CUDA torch's own run over all parameters at once (``foreach``) by default.

    Raises:
        UsageError: No such optimizer.
    """
    found = _OPTIMIZERS.get(name.lower().replace("-", "_"))
    if found is None:
        raise UsageError(
            f"There is no optimizer `{name}`. Known are {', '.join(f'`{n}`' for n in sorted(_OPTIMIZERS))}."
        )
    return lambda parameters: found(parameters, cuda)


def _torchs(name: str, **options: Any) -> Callable[[Sequence[torch.Tensor], bool], Any]:
    def make(parameters: Sequence[torch.Tensor], cuda: bool) -> Any:
        kind = getattr(torch.optim, name)
        chosen = {"lr": 1e-3, **options}
        if "fused" not in chosen:
            chosen["foreach"] = cuda
        return kind(parameters, **chosen)

    return make


class EightBitAdam(torch.optim.Optimizer):
    """The memory of bitsandbytes' AdamW in 8 bits; it computes nothing.

    Source:
        Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no loss
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or self.state[parameter]:
                    continue
                count = parameter.numel()
                for number in (1, 2):
                    if count < _MIN_8BIT:
                        self.state[parameter][f"state{number}"] = torch.empty(count)
                        continue
                    self.state[parameter][f"state{number}"] = torch.empty(count, dtype=torch.uint8)
                    self.state[parameter][f"absmax{number}"] = torch.empty(-(-count // _BLOCK))


class FactoredAdam(torch.optim.Optimizer):
    """The memory of Adafactor without a first moment, as transformers has it; it computes nothing.

    Source:
        Shazeer and Stern 2018, "Adafactor", arXiv 1804.04235: one number a row and one a column.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no loss
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    shape = tuple(parameter.shape)
                    if len(shape) >= 2:
                        self.state[parameter]["row"] = torch.empty(shape[:-1])
                        self.state[parameter]["column"] = torch.empty(shape[:-2] + shape[-1:])
                    else:
                        self.state[parameter]["square"] = torch.empty(shape)
                gradient = parameter.grad.float()
                update = gradient**2
                del gradient
                update.mul(1.0)


_OPTIMIZERS: dict[str, Callable[[Sequence[torch.Tensor], bool], Any]] = {
    "adamw": _torchs("AdamW"),
    "adam": _torchs("Adam"),
    "adamw_fused": _torchs("AdamW", fused=True),
    "sgd": _torchs("SGD"),
    "sgd_momentum": _torchs("SGD", momentum=0.9),
    "rmsprop": _torchs("RMSprop"),
    "adagrad": _torchs("Adagrad"),
    "adamw_8bit": lambda parameters, cuda: EightBitAdam(parameters),
    "adafactor": lambda parameters, cuda: FactoredAdam(parameters),
}
