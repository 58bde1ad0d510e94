"""Compare and hash tensors by their bits: NaN equals NaN, and 0.0 is not -0.0."""

from __future__ import annotations

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COLUMNS = 1021  # prime, so that columns of a matrix do not fall onto columns of the hash
_ROWS = 16


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits as integers; a view."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype is torch.bool:
        return tensor.view(torch.int8)
    if not tensor.dtype.is_floating_point:
        return tensor
    return tensor.view(_INTEGERS[tensor.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in bits, shape, stride, dtype and lazy conjugate and negative bits."""
    if a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.is_conj() != b.is_conj() or a.is_neg() != b.is_neg():
        return False
    return torch.equal(as_integers(a), as_integers(b))


def max_ulp(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest distance in units in the last place; ``inf`` for other shapes, or where only one is finite."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.dtype.is_floating_point:
        return 0.0 if torch.equal(a, b) else float("inf")
    x, y = _ordered(a), _ordered(b)
    finite = a.double().isfinite() & b.double().isfinite()  # not every dtype says so itself
    if not bool((finite | (x == y) | (a.isnan() & b.isnan())).all()):
        return float("inf")  # an overflow is no rounding error, though next to the largest number
    across = x.double().abs() + y.double().abs()  # of other signs: the difference may be more than an int64
    return float(across.where((x < 0) != (y < 0), (x - y).abs()).where(finite, 0).max()) if a.numel() else 0.0


def _ordered(tensor: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the floats: neighbours differ by one."""
    bits = as_integers(tensor).to(torch.int64)
    lowest = -(1 << (8 * tensor.element_size() - 1))
    return torch.where(bits < 0, lowest - bits, bits)


def all_equal(tensor: torch.Tensor) -> bool:
    """Whether every element is the same."""
    if tensor.numel() == 0:
        return True
    first = tensor[(0,) * tensor.dim()]
    step = max(1, tensor.size(-1) // 7)
    few = tensor[..., ::step]
    if few.dim() and few.numel() < tensor.numel() and not torch.equal(few, first.expand_as(few)):
        return False
    return torch.equal(tensor, first.expand_as(tensor))


def fingerprint(tensor: torch.Tensor) -> tuple[int, ...]:
    """A position-weighted hash of all bits (one pass, no temporary of the tensor's size)."""
    return tuple(hash_on_device(tensor).tolist())


def hash_on_device(tensor: torch.Tensor) -> torch.Tensor:
    """`fingerprint`, left on the device: two int64. Needs no temporary of the tensor's size if it is dense.

    Words that lie a multiple of 1021 apart and in one group of 16 rows are only added up; every other exchange of two
    different words changes the result.
    """
    words = _words(tensor.detach())
    length = words.numel()
    whole = length - length % (_ROWS * _COLUMNS)
    if not whole:
        return _weighted(words).expand(2)
    sums = words[:whole].view(-1, _ROWS, _COLUMNS).sum(dim=1)
    return torch.stack((_weighted(sums.view(-1)), _weighted(words[whole:])))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits in memory order as int64, where they divide into them; else one int64 per element."""
    bits = as_integers(tensor)
    for dimension, (size, stride) in enumerate(zip(bits.shape, bits.stride(), strict=True)):
        if stride == 0 and size > 1:
            bits = bits.narrow(dimension, 0, 1)  # expanded: the same element over and over
    if bits.is_contiguous():
        flat = bits.view(-1)
    elif torch.ops.aten.is_non_overlapping_and_dense(bits):
        flat = bits.as_strided((bits.numel(),), (1,), bits.storage_offset())
    else:
        flat = bits.reshape(-1)
    per_word = 8 // flat.element_size()
    if flat.stride(0) == 1 and flat.numel() % per_word == 0 and flat.storage_offset() % per_word == 0:
        return flat.view(torch.int64)
    return flat.to(torch.int64)


def _weighted(sums: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(1, sums.numel() + 1, dtype=torch.int64, device=sums.device)
    return weights.mul_(2654435761).add_(40503).mul_(sums).sum()
