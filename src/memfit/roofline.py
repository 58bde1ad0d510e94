"""Seconds of an op from what it computes and what it moves. No torch.

An op takes as long as the slower of the two: its arithmetic at the device's rate for the dtype, or its bytes at the
bandwidth of the memory; and never less than a launch.

Source:
    Williams, Waterman and Patterson 2009, "Roofline: An Insightful Visual Performance Model for Multicore
    Architectures", CACM 52(4). Differs: each kind of op reaches its own share of the two roofs, and a launch is added.
"""

from __future__ import annotations

from typing import Literal

from memfit.hardware import Hardware

Kind = Literal["matmul", "attention", "elementwise", "copy"]


def op_seconds(hardware: Hardware, kind: Kind, *, flops: float, num_bytes: float, dtype: str) -> float:
    """How long one op takes.

    Args:
        hardware: The device.
        kind: ``matmul`` (convolutions too) and ``attention`` (fused) run at the dtype's matmul rate; ``elementwise``
            (normalisations, reductions, losses too) and ``copy`` at that of fp32, which they never reach.
        flops: Additions and multiplications, each counted as one.
        num_bytes: Read and written, together.
        dtype: Of the operands, such as ``bf16`` or ``torch.bfloat16``.

    Raises:
        UsageError: The device has no such dtype.
    """
    compute = 0.0
    if flops > 0:
        rate = hardware.flops_per_second(dtype if kind in ("matmul", "attention") else "fp32")
        if kind == "matmul":
            rate *= hardware.matmul_efficiency
        elif kind == "attention":
            rate *= hardware.attention_efficiency
        compute = flops / rate
    share = hardware.elementwise_efficiency if kind == "elementwise" else hardware.copy_efficiency
    return max(compute, num_bytes / (hardware.memory_bytes_per_second * share)) + hardware.launch_seconds
