"""Weights that bitsandbytes keeps in 4 bits: ordinary tensors whose class adds attributes, with statistics beside them.

Source:
    bitsandbytes 0.50 `nn/modules.py` (`Params4bit`) and `functional.py` (`QuantState`); Dettmers et al. 2023, "QLoRA",
    arXiv 2305.14314.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_PACKAGE = "bitsandbytes"
_NAMES = ("Params4bit",)
_NESTED = "state2"


class PlainTypes:
    """Classes of tensors whose ops are torch's own, seen as they are by a dispatch mode."""

    def __init__(self) -> None:
        self._known: dict[type, bool] = {torch.Tensor: True, torch.nn.Parameter: True}

    def __contains__(self, kind: type) -> bool:
        known = self._known.get(kind)
        if known is None:
            known = self._known[kind] = _is_4bit(kind)
        return known


PLAIN_TYPES = PlainTypes()


def _is_4bit(kind: type) -> bool:
    return (
        issubclass(kind, torch.nn.Parameter)
        and any(base.__name__ in _NAMES and base.__module__.partition(".")[0] == _PACKAGE for base in kind.__mro__)
        and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )


class Statistics:
    """The tensors of a weight's `quant_state`, looked up anew each time: who quantizes again makes others."""

    def __init__(self, parameters: dict[str, Any], weight: str, *, nested: bool) -> None:
        """Of ``parameters[weight]``; ``nested``: of the statistics' own quantization."""
        self._parameters = parameters
        self._weight = weight
        self._nested = nested

    def get(self, name: str) -> Any:
        """The tensor of that name now, or ``None``."""
        state = getattr(self._parameters.get(self._weight), "quant_state", None)
        return getattr(getattr(state, _NESTED, None) if self._nested else state, name, None)

    def __getitem__(self, name: str) -> Any:
        return self.get(name)

    def names(self) -> list[str]:
        """Of the tensors that are there now."""
        state = getattr(self._parameters.get(self._weight), "quant_state", None)
        state = getattr(state, _NESTED, None) if self._nested else state
        return [name for name, value in vars(state).items() if isinstance(value, torch.Tensor)] if state else []


def statistics_of(parameters: dict[str, Any], weight: str) -> Iterator[tuple[str, str, Statistics]]:
    """Of a module's weight: where its statistics are (``weight.quant_state``), the name of each, and how to read it.

    Read by ``get``, which no class overrides: ``parameters[weight]`` gathers the weight under ZeRO 3.
    """
    kind = type(parameters.get(weight))
    if kind in (torch.Tensor, torch.nn.Parameter) or kind not in PLAIN_TYPES:
        return
    for nested in (False, True):
        found = Statistics(parameters, weight, nested=nested)
        place = f"{weight}.quant_state" + (f".{_NESTED}" if nested else "")
        yield from ((place, name, found) for name in found.names())


__all__ = ["PLAIN_TYPES", "PlainTypes", "Statistics", "statistics_of"]
