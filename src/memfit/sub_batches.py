"""Sub-batches: some rows of a batch, in any structure, and the outputs of all of them put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memfit.errors import UsageError

_PLAIN = bool | int | float | str | None


def num_rows(batch: Any, name: str) -> int:
    """Rows of a batch: what the first dimensions of its tensors, and the lengths of its lists of values, agree on.

    Raises:
        UsageError: There are none, or they do not agree.
    """
    found: dict[str, int] = {}
    _collect(batch, name, found)
    if not found:
        raise UsageError(f"{name} has no rows: it holds no tensor with a first dimension, and no list of values.")
    first, length = next(iter(found.items()))
    for place, other in found.items():
        if other != length:
            raise UsageError(
                f"{first} has {length} rows and {place} has {other}: give what are no rows "
                "by `functools.partial(encode, mask=mask)`."
            )
    if length == 0:
        raise UsageError(f"{first} has no rows.")
    return length


def _collect(batch: Any, name: str, found: dict[str, int]) -> None:
    if isinstance(batch, Tensor):
        if batch.dim():
            found[name] = batch.shape[0]
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            _collect(value, f"{name}[{key!r}]", found)
    elif isinstance(batch, list | tuple):
        if _are_values(batch):
            found[name] = len(batch)
        else:
            for number, value in enumerate(batch):
                _collect(value, f"{name}[{number}]", found)


def _are_values(batch: Sequence[Any]) -> bool:
    """Whether a list is of rows itself, such as texts: nothing in it is a tensor, or holds others."""
    return bool(batch) and not any(isinstance(value, Tensor | Mapping | list | tuple) for value in batch)


def rows_of(batch: Any, start: int, end: int) -> Any:
    """Rows ``start`` to ``end``: views of tensors, in new mappings, tuples and lists."""
    if isinstance(batch, Tensor):
        return batch[start:end] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: rows_of(value, start, end) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        if _are_values(batch):
            return batch[start:end]
        items = [rows_of(value, start, end) for value in batch]
        if isinstance(batch, tuple) and hasattr(batch, "_fields"):
            return type(batch)(*items)
        return tuple(items) if isinstance(batch, tuple) else items
    return batch


def flattened(output: Any) -> tuple[list[Tensor], Any]:
    """The tensors that an encoder returned, and the rest: what `joined` wants beside them.

    Raises:
        UsageError: It returned something else than tensors with rows, or plain values.
    """
    leaves, spec = pytree.tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() == 0:
            raise UsageError("The encoder returned a tensor without rows. Return embeddings, one row for each input.")
        if not isinstance(leaf, (Tensor, _PLAIN)):
            raise UsageError(
                f"The encoder returned an object of {type(leaf).__name__} beside tensors. Return embeddings only: "
                "`lambda **batch: model(**batch).last_hidden_state[:, 0]`."
            )
    if not tensors:
        raise UsageError(f"The encoder returned {type(output).__name__}, without a tensor in it: return embeddings.")
    rest = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
    return tensors, (spec, rest)


def joined(tensors: Sequence[Tensor], rest: Any) -> Any:
    """A structure that `flattened` took apart, with other tensors."""
    spec, values = rest
    given = iter(tensors)
    return pytree.tree_unflatten([next(given) if value is None else value[0] for value in values], spec)


def together(pieces: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The tensors of all sub-batches, row after row.

    Raises:
        UsageError: They do not fit.
    """
    found = []
    for parts in zip(*pieces, strict=True):
        shapes = {(tuple(part.shape[1:]), part.dtype, part.device) for part in parts}
        if len(shapes) > 1:
            listed = ", ".join(str(list(part.shape)) for part in parts)
            raise UsageError(
                f"Sub-batches were encoded to tensors of {listed}, which make no batch: pool them, or pad alike."
            )
        found.append(torch.cat(parts))
    return found
