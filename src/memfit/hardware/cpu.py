"""A processor of a desktop, for planning where nothing better is known. The machine at hand is better measured:
`memfit doctor --calibrate`.
"""

from __future__ import annotations

from memfit.hardware.entry import Hardware

CPU = (
    Hardware(
        name="cpu",
        aliases=("generic cpu",),
        backend="cpu",
        memory_bytes=32 * 2**30,
        matmul_flops_per_second={"fp32": 768e9},
        memory_bytes_per_second=51.2e9,
        host_link_bytes_per_second=None,
        interconnect_bytes_per_second=None,
        network_bytes_per_second=None,
        launch_seconds=2e-6,
        matmul_efficiency=0.8,
        attention_efficiency=0.5,
        elementwise_efficiency=0.7,
        copy_efficiency=0.8,
        sources={
            "memory_bytes": "assumed: 32 GiB",
            "matmul_flops_per_second": "assumed: 8 cores × 3 GHz × 2 FMA units × 8 lanes × 2 (AVX2)",
            "memory_bytes_per_second": "assumed: two channels of DDR4-3200",
            "host_link_bytes_per_second": "none: it is the host",
            "interconnect_bytes_per_second": "none: one device",
            "network_bytes_per_second": "none: one device",
            "launch_seconds": "assumed: what torch spends on one small op",
            "matmul_efficiency": "assumed",
            "attention_efficiency": "assumed",
            "elementwise_efficiency": "assumed",
            "copy_efficiency": "assumed",
        },
    ),
)
