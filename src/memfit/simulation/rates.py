"""How long an op takes on a device: which kind of kernel it is, and the roofline of that."""

from __future__ import annotations

import torch

from memfit.hardware import Hardware
from memfit.roofline import Kind, op_seconds
from memfit.simulation.ledger import OpSeconds

_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_grouped_mm")
_COPIES = ("copy_", "clone", "_to_copy", "cat", "contiguous")


def rates(entry: Hardware) -> OpSeconds:
    """Seconds of ops on a device."""

    def seconds(name: str, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
        base = name.partition("::")[2]
        kind: Kind = "elementwise"
        if "attention" in base:
            kind = "attention"
        elif flops or base in _MATMULS:
            kind = "matmul"
        elif base in _COPIES:
            kind = "copy"
        return op_seconds(entry, kind, flops=flops, num_bytes=num_bytes, dtype=str(dtype))

    return seconds
