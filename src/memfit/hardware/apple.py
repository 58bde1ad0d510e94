"""Apple's chips: GPU and host share one memory, and fp16 runs at the rate of fp32.

Memory is that of the largest machine with the chip. Apple names the arithmetic rates of some chips; of the others they
are cores × 128 lanes × 2 × clock.
"""

from __future__ import annotations

from memfit.hardware.entry import Hardware

_GIB = 2**30


def _chip(name: str, *aliases: str, gib: int, flops: float, flops_source: str, bandwidth: float) -> Hardware:
    return Hardware(
        name=name,
        aliases=(f"apple {name}", *aliases),
        backend="mps",
        memory_bytes=gib * _GIB,
        matmul_flops_per_second={"fp32": flops, "bf16": flops, "fp16": flops},
        memory_bytes_per_second=bandwidth,
        host_link_bytes_per_second=None,
        interconnect_bytes_per_second=None,
        network_bytes_per_second=None,
        launch_seconds=1e-5,
        matmul_efficiency=0.77,
        attention_efficiency=0.4,
        elementwise_efficiency=0.8,
        copy_efficiency=0.83,
        sources={
            "memory_bytes": f"Apple: up to {gib} GB of unified memory",
            "matmul_flops_per_second": flops_source,
            "memory_bytes_per_second": "Apple: memory bandwidth of the chip with most GPU cores",
            "host_link_bytes_per_second": "none: unified memory",
            "interconnect_bytes_per_second": "none: one GPU",
            "network_bytes_per_second": "none: one GPU",
            "launch_seconds": "assumed",
            "matmul_efficiency": "measured: 8.0 of 10.4 TFLOP/s in fp32 on M1 Max (Turner, metal-flash-attention); "
            "assumed for the other chips",
            "attention_efficiency": "assumed",
            "elementwise_efficiency": "assumed",
            "copy_efficiency": "measured: STREAM, about 100 of 120 GB/s on M4 (Hübner et al. 2025, arXiv:2502.05317); "
            "assumed for the other chips",
        },
    )


APPLE = (
    _chip("m1", gib=16, flops=2.6e12, flops_source="Apple: 2.6 teraflops", bandwidth=68.25e9),
    _chip("m1-max", gib=64, flops=10.4e12, flops_source="Apple: 10.4 teraflops", bandwidth=400e9),
    _chip("m2", gib=24, flops=3.6e12, flops_source="Apple: 3.6 teraflops", bandwidth=100e9),
    _chip(
        "m2-max",
        gib=96,
        flops=13.6e12,
        flops_source="half of M2 Ultra, for which Apple names 27.2 teraflops",
        bandwidth=400e9,
    ),
    _chip("m3-max", gib=128, flops=14.2e12, flops_source="40 cores × 128 × 2 × 1.38 GHz", bandwidth=400e9),
    _chip("m4-max", gib=128, flops=18.4e12, flops_source="40 cores × 128 × 2 × 1.8 GHz", bandwidth=546e9),
)
