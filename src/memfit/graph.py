"""The autograd graph of one block call: its fingerprint, and which saved tensors belong to custom Functions.

Two calls that pack equal tensors may still differ in what they compute between them: SiLU swapped for GELU, a scale in
a closure. The graph tells: node names, edges, and the scalars that autograd exposes (``_saved_alpha``, ``_saved_dim``).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch


def stops(inputs: Iterable[torch.Tensor]) -> set[Any]:
    """The nodes at which a walk from the outputs ends: those that made the inputs."""
    return {tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None}


def fingerprint(
    outputs: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor], limit: int = 20_000
) -> tuple[Any, ...]:
    """Names, edges and scalars of the nodes between outputs and inputs, in a fixed order."""
    found = _walk(outputs, inputs, limit)
    return tuple((name, edges, _scalars(node)) for node, name, edges in found)


def custom_nodes(outputs: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor]) -> list[Any]:
    """The nodes of Python autograd Functions."""
    return [
        node
        for node, _, _ in _walk(outputs, inputs, 20_000)
        if isinstance(node, torch.autograd.function.BackwardCFunction)
    ]


def _walk(outputs: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor], limit: int) -> list[tuple[Any, str, Any]]:
    ends = stops(inputs)
    number: dict[Any, int] = {}
    order: list[Any] = []
    roots = []
    for tensor in outputs:
        node = tensor.grad_fn
        if node is not None and node not in ends:
            roots.append(node)
    stack = list(reversed(roots))
    found: list[tuple[Any, str, Any]] = []
    while stack and len(order) < limit:
        node = stack.pop()
        if node in number:
            continue
        number[node] = len(order)
        order.append(node)
        for child, _ in reversed(node.next_functions):
            if child is not None and child not in number and child not in ends:
                stack.append(child)
    for node in order:
        edges = tuple(
            (-1 if child is None else -2 if child in ends else number.get(child, -3), slot)
            for child, slot in node.next_functions
        )
        name = node.name()
        found.append((node, _SAME.get(name, name), edges))
    return found


_SAME = {"ReshapeAliasBackward0": "ViewBackward0", "UnsafeViewBackward0": "ViewBackward0"}
"""``reshape`` takes another of these under a dispatch mode, so while recording."""


@lru_cache(maxsize=512)
def _scalar_names(kind: type) -> tuple[str, ...]:
    attributes = dir(kind)
    raw = {name.removeprefix("_raw") for name in attributes if name.startswith("_raw_saved_")}
    return tuple(name for name in attributes if name.startswith("_saved_") and name not in raw)


def _scalars(node: Any) -> tuple[Any, ...]:
    found = []
    kind: type = type(node)
    for name in _scalar_names(kind):
        value = getattr(node, name)
        if isinstance(value, (bool, int, float, str, complex, tuple, list)) or value is None:
            found.append((name, repr(value)))
    other = getattr(node, "_raw_saved_other", None)
    if other is not None and getattr(other, "unpack_hook", other) is None:
        number = other.data  # `x * 1.7`: a Python number passes by every hook
        if isinstance(number, torch.Tensor) and number.dim() == 0 and number.device.type == "cpu":
            found.append(("_saved_other", repr(number.item())))
    return tuple(found)
