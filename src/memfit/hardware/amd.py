"""AMD's accelerators. Under ROCm torch calls them `cuda`."""

from __future__ import annotations

from memfit.hardware.entry import Hardware
from memfit.hardware.nvidia import NDR, PCIE_5, PCIE_5_SOURCE, TORCH_TOTAL

_DATASHEET = "AMD Instinct MI300X Accelerator data sheet, without sparsity"

AMD = (
    Hardware(
        name="mi300x",
        aliases=("instinct mi300x", "amd instinct mi300x"),
        backend="cuda",
        memory_bytes=int(191.69 * 2**30),
        matmul_flops_per_second={
            "fp32": 163.4e12,
            "tf32": 653.7e12,
            "bf16": 1307.4e12,
            "fp16": 1307.4e12,
            "fp8": 2614.9e12,
        },
        memory_bytes_per_second=5.3e12,
        host_link_bytes_per_second=PCIE_5,
        interconnect_bytes_per_second=448e9,
        network_bytes_per_second=NDR,
        launch_seconds=5e-6,
        matmul_efficiency=0.51,
        attention_efficiency=0.35,
        elementwise_efficiency=0.75,
        copy_efficiency=0.8,
        sources={
            "memory_bytes": TORCH_TOTAL,
            "matmul_flops_per_second": _DATASHEET,
            "memory_bytes_per_second": _DATASHEET,
            "host_link_bytes_per_second": PCIE_5_SOURCE,
            "interconnect_bytes_per_second": f"{_DATASHEET}: seven Infinity Fabric links of 128 GB/s, halved",
            "network_bytes_per_second": "assumed: one NDR InfiniBand link of 400 Gb/s for each device, as Azure's ND "
            "MI300X v5 has them",
            "launch_seconds": "assumed: a few microseconds from one small kernel to the next",
            "matmul_efficiency": "measured: best shape of mamf-finder, bf16 (Bekman, Machine Learning Engineering Open "
            "Book): 668.4 of 1300 TFLOP/s",
            "attention_efficiency": "assumed: as H100 with FlashAttention-2",
            "elementwise_efficiency": "assumed",
            "copy_efficiency": "assumed",
        },
    ),
)
