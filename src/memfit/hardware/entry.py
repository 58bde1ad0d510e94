"""One device: its memory, its rates, and how much of them real kernels reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from memfit.errors import UsageError

Dtype = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]
Backend = Literal["cuda", "mps", "cpu"]

DTYPES: tuple[Dtype, ...] = ("fp32", "tf32", "bf16", "fp16", "fp8")
SOURCED = (
    "memory_bytes",
    "matmul_flops_per_second",
    "memory_bytes_per_second",
    "host_link_bytes_per_second",
    "interconnect_bytes_per_second",
    "network_bytes_per_second",
    "launch_seconds",
    "matmul_efficiency",
    "attention_efficiency",
    "elementwise_efficiency",
    "copy_efficiency",
)
"""The fields of an entry that `Hardware.sources` accounts for."""

MACHINE_DEVICES = 8
"""Of each machine, where there are more: as NVIDIA's HGX and DGX systems and AMD's Instinct platforms have them."""

_SPELLINGS: dict[str, Dtype] = {
    **{name: name for name in DTYPES},
    "float32": "fp32",
    "float": "fp32",
    "tfloat32": "tf32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What one device can do.

    Rates are those of dense matrices that accumulate in fp32, as training needs it; links count one direction. A rate
    times its efficiency is what a large operation reaches.

    Attributes:
        name: As a command line writes it: ``rtx4090``.
        aliases: Other names of the same device.
        backend: What torch calls the device; ROCm calls itself ``cuda``.
        memory_bytes: Memory that torch can use on one device; what the driver keeps for itself is not in it.
        matmul_flops_per_second: By dtype; a dtype that is not there is not supported in hardware.
        memory_bytes_per_second: Bandwidth of the device's own memory, reads and writes together.
        host_link_bytes_per_second: To and from the host; ``None`` where host and device share their memory.
        interconnect_bytes_per_second: To and from the other devices of the machine; ``None`` where there are none.
        network_bytes_per_second: To and from other machines, of each device; ``None`` where no system says.
        launch_seconds: What the smallest kernel takes: no op is faster.
        matmul_efficiency: Share of the matmul rate that large matrix products reach.
        attention_efficiency: Share of the matmul rate that fused attention reaches, forward and backward.
        elementwise_efficiency: Share of the memory bandwidth that element-wise kernels reach.
        copy_efficiency: Share of the memory bandwidth, and of the links', that copies reach.
        sources: Where each number is from, by field: a datasheet, a paper, ``measured: ...`` or ``assumed: ...``.
    """

    name: str
    backend: Backend
    memory_bytes: int
    matmul_flops_per_second: Mapping[Dtype, float]
    memory_bytes_per_second: float
    host_link_bytes_per_second: float | None
    interconnect_bytes_per_second: float | None
    network_bytes_per_second: float | None
    launch_seconds: float
    matmul_efficiency: float
    attention_efficiency: float
    elementwise_efficiency: float
    copy_efficiency: float
    sources: Mapping[str, str]
    aliases: tuple[str, ...] = ()

    def flops_per_second(self, dtype: str) -> float:
        """The matmul rate of a dtype: ``bf16``, ``bfloat16`` or ``torch.bfloat16``.

        What has no rate of its own runs at that of fp32: bf16 on an old CPU, fp64, integers.

        Raises:
            UsageError: fp8 on a device that has none: nothing stands in for it.
        """
        word = dtype.removeprefix("torch.")
        known = _SPELLINGS.get(word, "fp32")
        rate = self.matmul_flops_per_second.get(known)
        if rate is not None:
            return rate
        if known == "fp8":
            raise UsageError(f"`{self.name}` has no fp8: write one of {', '.join(self.matmul_flops_per_second)}.")
        return self.matmul_flops_per_second["fp32"]

    def link_bytes_per_second(self, ring: Sequence[int]) -> float | None:
        """What a ring of ranks moves; ``None`` where nobody knows.

        Across machines as many rings run as each machine has devices in it, every one over the network link of another;
        together they are no faster than the links inside. Without a network all are linked as inside.
        """
        inside, outside = self.interconnect_bytes_per_second, self.network_bytes_per_second
        present = Counter(rank // MACHINE_DEVICES for rank in ring).values()
        if len(present) == 1 or inside is None or outside is None:
            return inside
        return min(inside, outside * min(present))
