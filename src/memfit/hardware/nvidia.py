"""NVIDIA's cards.

Tensor rates are dense and accumulate in fp32. GeForce cards run those at half of the rate that their boxes name, which
accumulates in fp16; the whitepapers list both.
"""

from __future__ import annotations

from memfit.hardware.entry import Dtype, Hardware

_T = 1e12
_G = 1e9
_GIB = 2**30

PCIE_4 = 31.5e9
PCIE_5 = 63.0e9
PCIE_4_SOURCE = "PCIe 4.0 x16, one direction: 16 GT/s, 128b/130b"
PCIE_5_SOURCE = "PCIe 5.0 x16, one direction: 32 GT/s, 128b/130b"
HDR = 25e9
NDR = 50e9
TORCH_TOTAL = "total capacity in torch's out-of-memory messages, for cards of this size"

_MAMF = "measured: best shape of mamf-finder, bf16 (Bekman, Machine Learning Engineering Open Book)"
_FLASH_2 = "FlashAttention-2 (Dao 2023): 63% in the backward pass on A100, up to 73% in the forward pass"
_FLASH_HOPPER = "FlashAttention-3 (Shah et al. 2024): FlashAttention-2 reaches 35% on H100"
_AMPERE_MATMUL = (0.87, f"{_MAMF}: 271.2 of 312 TFLOP/s")
_HOPPER_MATMUL = (0.80, f"{_MAMF}: 794.5 of 989 TFLOP/s")
_LIKE_A100 = (0.87, "assumed: as A100 SXM")
_LIKE_H100 = (0.80, "assumed: as H100 SXM")
_HDR = (HDR, "NVIDIA DGX A100 datasheet: eight single-port ConnectX-6, HDR InfiniBand of 200 Gb/s, for eight GPUs")
_NDR = (NDR, "NVIDIA DGX H100 and H200 user guide: eight single-port ConnectX-7 of 400 Gb/s for eight GPUs")
_FLASH_A100 = (0.63, _FLASH_2)
_FLASH_H100 = (0.35, _FLASH_HOPPER)


def _card(
    name: str,
    *aliases: str,
    gib: float,
    flops: dict[Dtype, float],
    bandwidth: float,
    pcie: float,
    datasheet: str,
    matmul: tuple[float, str],
    attention: tuple[float, str],
    nvlink: float | None = None,
    network: tuple[float | None, str] = (None, "none: no system of NVIDIA's names a link for each card"),
) -> Hardware:
    """One card. ``nvlink`` counts one direction, half of what datasheets name; ``None``: cards meet over PCIe."""
    pcie_source = PCIE_5_SOURCE if pcie == PCIE_5 else PCIE_4_SOURCE
    return Hardware(
        name=name,
        aliases=aliases,
        backend="cuda",
        memory_bytes=int(gib * _GIB),
        matmul_flops_per_second=flops,
        memory_bytes_per_second=bandwidth,
        host_link_bytes_per_second=pcie,
        interconnect_bytes_per_second=pcie if nvlink is None else nvlink,
        network_bytes_per_second=network[0],
        launch_seconds=5e-6,
        matmul_efficiency=matmul[0],
        attention_efficiency=attention[0],
        elementwise_efficiency=0.85,
        copy_efficiency=0.9,
        sources={
            "memory_bytes": TORCH_TOTAL,
            "matmul_flops_per_second": datasheet,
            "memory_bytes_per_second": datasheet,
            "host_link_bytes_per_second": pcie_source,
            "interconnect_bytes_per_second": pcie_source if nvlink is None else f"{datasheet}: NVLink, halved",
            "network_bytes_per_second": network[1],
            "launch_seconds": "assumed: a few microseconds from one small kernel to the next",
            "matmul_efficiency": matmul[1],
            "attention_efficiency": attention[1],
            "elementwise_efficiency": "assumed",
            "copy_efficiency": "assumed",
        },
    )


_HOPPER: dict[Dtype, float] = {
    "fp32": 67 * _T,
    "tf32": 494.7 * _T,
    "bf16": 989.4 * _T,
    "fp16": 989.4 * _T,
    "fp8": 1978.9 * _T,
}
_A100: dict[Dtype, float] = {"fp32": 19.5 * _T, "tf32": 156 * _T, "bf16": 312 * _T, "fp16": 312 * _T}

NVIDIA = (
    _card(
        "rtx3060",
        "geforce rtx 3060",
        "rtx3060-12gb",
        gib=11.62,
        flops={"fp32": 12.7 * _T, "tf32": 12.7 * _T, "bf16": 25.5 * _T, "fp16": 25.5 * _T},
        bandwidth=360 * _G,
        pcie=PCIE_4,
        datasheet="NVIDIA GA102 whitepaper: 512 FLOP per clock and SM in fp16 with fp32 accumulate, 128 cores per SM; "
        "GeForce RTX 3060: 28 SMs, 1777 MHz, 15 Gbit/s on 192 bits",
        matmul=_LIKE_A100,
        attention=(0.63, f"assumed: {_FLASH_2}"),
    ),
    _card(
        "rtx3090",
        "geforce rtx 3090",
        gib=23.68,
        flops={"fp32": 35.6 * _T, "tf32": 35.6 * _T, "bf16": 71 * _T, "fp16": 71 * _T},
        bandwidth=936 * _G,
        pcie=PCIE_4,
        datasheet="NVIDIA Ampere GA102 GPU Architecture whitepaper",
        matmul=_LIKE_A100,
        attention=(0.63, f"assumed: {_FLASH_2}"),
    ),
    _card(
        "rtx4090",
        "geforce rtx 4090",
        gib=23.64,
        flops={"fp32": 82.6 * _T, "tf32": 82.6 * _T, "bf16": 165.2 * _T, "fp16": 165.2 * _T, "fp8": 330.3 * _T},
        bandwidth=1008 * _G,
        pcie=PCIE_4,
        datasheet="NVIDIA Ada GPU Architecture whitepaper",
        matmul=_LIKE_A100,
        attention=(0.63, f"assumed: {_FLASH_2}"),
    ),
    _card(
        "rtx5090",
        "geforce rtx 5090",
        gib=31.36,
        flops={"fp32": 104.8 * _T, "tf32": 104.8 * _T, "bf16": 209.5 * _T, "fp16": 209.5 * _T, "fp8": 419 * _T},
        bandwidth=1792 * _G,
        pcie=PCIE_5,
        datasheet="NVIDIA RTX Blackwell GPU Architecture whitepaper",
        matmul=_LIKE_A100,
        attention=(0.63, f"assumed: {_FLASH_2}"),
    ),
    _card(
        "rtxa6000",
        "a6000",
        "nvidia rtx a6000",
        gib=47.53,
        flops={"fp32": 38.7 * _T, "tf32": 77.4 * _T, "bf16": 154.8 * _T, "fp16": 154.8 * _T},
        bandwidth=768 * _G,
        pcie=PCIE_4,
        datasheet="NVIDIA RTX A6000 datasheet, tensor rates without sparsity",
        matmul=_LIKE_A100,
        attention=(0.63, f"assumed: {_FLASH_2}"),
    ),
    _card(
        "l4",
        "nvidia l4",
        gib=22.03,
        flops={"fp32": 30.3 * _T, "tf32": 60 * _T, "bf16": 121 * _T, "fp16": 121 * _T, "fp8": 242.5 * _T},
        bandwidth=300 * _G,
        pcie=PCIE_4,
        datasheet="NVIDIA L4 datasheet, tensor rates without sparsity",
        matmul=(0.87, "assumed: as A100 SXM; its 72 W may hold it lower"),
        attention=(0.63, f"assumed: {_FLASH_2}"),
    ),
    _card(
        "l40s",
        "nvidia l40s",
        gib=44.39,
        flops={"fp32": 91.6 * _T, "tf32": 183 * _T, "bf16": 362 * _T, "fp16": 362 * _T, "fp8": 733 * _T},
        bandwidth=864 * _G,
        pcie=PCIE_4,
        datasheet="NVIDIA L40S datasheet",
        matmul=_LIKE_A100,
        attention=(0.63, f"assumed: {_FLASH_2}"),
    ),
    _card(
        "a100-40gb",
        "a100-sxm4-40gb",
        "a100-sxm-40gb",
        gib=39.38,
        flops=_A100,
        bandwidth=1555 * _G,
        pcie=PCIE_4,
        nvlink=300 * _G,
        network=_HDR,
        datasheet="NVIDIA A100 Tensor Core GPU datasheet",
        matmul=_AMPERE_MATMUL,
        attention=_FLASH_A100,
    ),
    _card(
        "a100-80gb",
        "a100-sxm4-80gb",
        "a100-sxm-80gb",
        gib=79.14,
        flops=_A100,
        bandwidth=2039 * _G,
        pcie=PCIE_4,
        nvlink=300 * _G,
        network=_HDR,
        datasheet="NVIDIA A100 Tensor Core GPU datasheet",
        matmul=_AMPERE_MATMUL,
        attention=_FLASH_A100,
    ),
    _card(
        "h100",
        "h100-sxm",
        "h100-80gb",
        "h100-80gb-hbm3",
        gib=79.14,
        flops=_HOPPER,
        bandwidth=3350 * _G,
        pcie=PCIE_5,
        nvlink=450 * _G,
        network=_NDR,
        datasheet="NVIDIA H100 Tensor Core GPU datasheet, tensor rates without sparsity",
        matmul=_HOPPER_MATMUL,
        attention=_FLASH_H100,
    ),
    _card(
        "h100-pcie",
        gib=79.14,
        flops={"fp32": 51 * _T, "tf32": 378 * _T, "bf16": 756 * _T, "fp16": 756 * _T, "fp8": 1513 * _T},
        bandwidth=2000 * _G,
        pcie=PCIE_5,
        datasheet="NVIDIA H100 Tensor Core GPU datasheet, tensor rates without sparsity",
        matmul=_LIKE_H100,
        attention=_FLASH_H100,
    ),
    _card(
        "h200",
        "h200-sxm",
        "h200-141gb",
        gib=139.72,
        flops=_HOPPER,
        bandwidth=4800 * _G,
        pcie=PCIE_5,
        nvlink=450 * _G,
        network=_NDR,
        datasheet="NVIDIA H200 Tensor Core GPU datasheet, tensor rates without sparsity",
        matmul=_LIKE_H100,
        attention=(0.35, f"assumed: {_FLASH_HOPPER}"),
    ),
    _card(
        "b200",
        "hgx-b200",
        gib=178.35,
        flops={"fp32": 80 * _T, "tf32": 1100 * _T, "bf16": 2250 * _T, "fp16": 2250 * _T, "fp8": 4500 * _T},
        bandwidth=8000 * _G,
        pcie=PCIE_5,
        nvlink=900 * _G,
        network=(NDR, "NVIDIA DGX B200 user guide: eight single-port ConnectX-7 of 400 Gb/s for eight GPUs"),
        datasheet="NVIDIA Blackwell Architecture Technical Brief: HGX B200, tensor rates without sparsity",
        matmul=_LIKE_H100,
        attention=(0.35, f"assumed: {_FLASH_HOPPER}"),
    ),
)
