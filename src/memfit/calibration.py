"""Measure what the machine at hand can do: the rates that an entry of `hardware` has, by running the ops.

Each rate is the median of repeats that fill a slice of time, so that a busy moment does not count, and the whole takes
under ten seconds on a CPU and under thirty on a GPU. The CUDA path times with device events; it is written from torch's
documentation and has not run on a GPU yet. Not measured are fp8, and the links between devices, which come from the
table where the card is in it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median

import torch
from torch.nn import functional

from memfit import host
from memfit._version import __version__
from memfit.costs import Stopwatch
from memfit.errors import UnknownNameError
from memfit.hardware import CalibrationRecord, Dtype, Hardware, find
from memfit.hardware.records import HERE

SLICE_SECONDS = {"cpu": 0.3, "cuda": 1.5}
"""For one rate. The first run of an op, and finding the size of a matrix product, come on top."""

_MIN_REPEATS, _MAX_REPEATS = 3, 200
_ENOUGH_SECONDS = {"cpu": 0.02, "cuda": 0.004}
"""From there on a product is large."""
_MAX_MATRIX = {"cpu": 4096, "cuda": 16384}
_MAX_COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ATTENTION = {"cpu": (1, 4, 1024, 64), "cuda": (4, 32, 2048, 128)}
"""Batch, heads, tokens, size of a head."""
_LAUNCHES = 200


def calibrate(*, progress: Callable[[str], None] = lambda _: None) -> CalibrationRecord:
    """Measure the first GPU, or the CPU where there is none.

    Args:
        progress: Told what is measured next.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    hardware = _measure(device, progress)
    return CalibrationRecord(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device_name(device),
        num_threads=torch.get_num_threads(),
        memfit=__version__,
        torch=torch.__version__,
        hardware=hardware,
    )


def device_name(device: torch.device) -> str:
    """What the device is called: the card, or the model of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "model name" and value.strip().isprintable():
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def _measure(device: torch.device, progress: Callable[[str], None]) -> Hardware:
    kind = device.type
    rates: dict[Dtype, float] = {}
    for name, dtype in _DTYPES.items():
        progress(f"matrix products in {name}")
        rates[name] = _matmul_rate(device, dtype)
    if kind == "cuda":
        progress("matrix products in tf32")
        rates["tf32"] = _matmul_rate(device, torch.float32, precision="tf32")
    progress("attention")
    fast: Dtype = "bf16" if kind == "cuda" else "fp32"
    attention = _attention_rate(device, _DTYPES[fast])
    progress("copies")
    copy, elementwise = _memory_rates(device)
    host_link = None
    if kind == "cuda":
        progress("the link to the host")
        host_link = _host_link_rate(device)
    launch = _launch_seconds(device)
    (link, link_source), (network, network_source) = _links(device)
    measured = f"measured: torch {torch.__version__} on {device_name(device)}"
    return Hardware(
        name=HERE,
        backend="cuda" if kind == "cuda" else "cpu",
        memory_bytes=torch.cuda.mem_get_info(device)[1] if kind == "cuda" else host.total_bytes(),
        matmul_flops_per_second=rates,
        memory_bytes_per_second=copy,
        host_link_bytes_per_second=host_link,
        interconnect_bytes_per_second=link,
        network_bytes_per_second=network,
        launch_seconds=launch,
        # The rates are what was reached, so the shares say only how other kinds of ops compare.
        matmul_efficiency=1.0,
        attention_efficiency=attention / rates[fast],
        elementwise_efficiency=elementwise / copy,
        copy_efficiency=1.0,
        sources={
            "memory_bytes": "torch" if kind == "cuda" else "the system: RAM, or the limit of the cgroup",
            "matmul_flops_per_second": measured,
            "memory_bytes_per_second": f"{measured}, a copy",
            "host_link_bytes_per_second": f"{measured}, pinned" if host_link else "none: it is the host",
            "interconnect_bytes_per_second": link_source,
            "network_bytes_per_second": network_source,
            "launch_seconds": measured,
            "matmul_efficiency": "1: the rate is measured",
            "attention_efficiency": f"{measured}, forward and backward in {fast}",
            "elementwise_efficiency": f"{measured}, an addition in fp32",
            "copy_efficiency": "1: the bandwidth is measured",
        },
    )


def _matmul_rate(device: torch.device, dtype: torch.dtype, *, precision: str = "ieee") -> float:
    """Of fp32 in that precision, whatever the process uses otherwise."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        return _product_rate(device, dtype)
    finally:
        backend.fp32_precision = before


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Sizes double until one product is long enough that what it takes to start does not count."""
    size = 256
    while True:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty(size, size, device=device, dtype=dtype)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        product()
        if _seconds(product, device) >= _ENOUGH_SECONDS[device.type] or size >= _MAX_MATRIX[device.type]:
            return 2.0 * size**3 / _median_seconds(product, device)
        size *= 2


def _attention_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Forward and backward: 2 matrix products, then 5, one of which runs the forward's again."""
    batch, heads, tokens, width = _ATTENTION[device.type]
    query, key, value = (
        torch.randn(batch, heads, tokens, width, device=device).to(dtype).requires_grad_() for _ in range(3)
    )
    gradient = torch.randn(batch, heads, tokens, width, device=device).to(dtype)

    def step() -> None:
        with torch.enable_grad():
            output = functional.scaled_dot_product_attention(query, key, value)
            torch.autograd.grad(output, (query, key, value), gradient)

    step()
    return 14.0 * batch * heads * tokens**2 * width / _median_seconds(step, device)


def _memory_rates(device: torch.device) -> tuple[float, float]:
    """Bytes read and written per second: by a copy, and by an addition of two tensors."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host.free_bytes()
    size = max(1 << 20, min(_MAX_COPY_BYTES[device.type], free // 8))
    a, b = (torch.ones(size // 4, device=device) for _ in range(2))
    out = torch.empty_like(a).zero_()
    copy = 2 * size / _median_seconds(lambda: out.copy_(a), device)
    return copy, 3 * size / _median_seconds(lambda: torch.add(a, b, out=out), device)


def _host_link_rate(device: torch.device) -> float:
    """Pinned memory, the slower direction."""
    size = 256 << 20
    here = torch.ones(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    return min(
        size / _median_seconds(lambda: there.copy_(here, non_blocking=True), device),
        size / _median_seconds(lambda: here.copy_(there, non_blocking=True), device),
    )


def _launch_seconds(device: torch.device) -> float:
    """From one op on a single element to the next, as an eager step issues them."""
    one = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(_LAUNCHES):
            one.add_(1.0)

    launches()
    return _median_seconds(launches, device) / _LAUNCHES


def _links(device: torch.device) -> list[tuple[float | None, str]]:
    """To other devices, and to other machines: of the card in the table; with where each is from."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return [(None, "none: one device")] * 2
    try:
        known = find(torch.cuda.get_device_name(device))
    except UnknownNameError:
        return [(None, "none: not measured, and the card is not in the table")] * 2
    return [
        (known.interconnect_bytes_per_second, known.sources["interconnect_bytes_per_second"]),
        (known.network_bytes_per_second, known.sources["network_bytes_per_second"]),
    ]


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of repeats until the slice is over. The op has run before, or its first run is one repeat of many."""
    end = time.perf_counter() + SLICE_SECONDS[device.type]
    found: list[float] = []
    while len(found) < _MIN_REPEATS or (len(found) < _MAX_REPEATS and time.perf_counter() < end):
        found.append(_seconds(run, device))
    return median(found)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """One run: device events on CUDA, a clock elsewhere."""
    with torch.no_grad():
        watch = Stopwatch(device) if device.type == "cuda" else None
        began = time.perf_counter()
        run()
        if watch is None:
            return max(time.perf_counter() - began, 1e-9)
        watch.stop()
        return max(watch.seconds, 1e-9)
