"""How much memory a device has, how much this process holds of it, and how high that went.

One `Meter` a device. On CUDA the numbers come from the caching allocator; a budget means *reserved* bytes, since
reserved memory is what a neighbour cannot have. On CPU they are the kernel's: the resident set and its highest value.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Literal

import torch

from memfit import host
from memfit.errors import BudgetError
from memfit.heap import heap
from memfit.host import Allocator, allocator
from memfit.units import Budget, BudgetChoice, format_bytes, parse_budget, parse_budgets

__all__ = ["Allocator", "Meter", "allocator", "meter", "resolve_budget", "resolve_budgets"]

# What "auto" leaves alone. On CPU everybody else on the machine lives there too; on CUDA library workspaces come later.
_AUTO_MARGIN = {"cpu": 0.10, "cuda": 0.05}


class Meter(ABC):
    """Reads the memory of one device. All results are bytes.

    Attributes:
        device: The device it reads.
        can_reset_peak: Whether `reset_peak` works. If not, `peak` is the highest value that `now` has returned since,
            or more: a lower bound of the truth.
    """

    device: torch.device
    can_reset_peak: bool = True

    @abstractmethod
    def now(self) -> int:
        """What this process holds now: the resident set, or reserved bytes. The unit of budgets."""

    @abstractmethod
    def peak(self) -> int:
        """The highest value of `now` since `reset_peak`."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Begin a new peak, from what is held now."""

    @abstractmethod
    def allocated(self) -> int:
        """What tensors take now, without what the allocator keeps for later. On CPU the same as `now`."""

    @abstractmethod
    def allocated_peak(self) -> int:
        """The highest value of `allocated` since `reset_peak`."""

    @abstractmethod
    def release(self) -> None:
        """Hand freed memory back, so that `now` is what is in use. Slow: every use again is a page fault."""

    def show_what_lives(self, on: bool) -> None:
        """While on, freed memory goes back at once where that can be had, so that `peak` is of what is alive. Slow."""
        return

    @abstractmethod
    def total(self) -> int:
        """What this process may have at most: the base of a budget in percent."""

    @abstractmethod
    def free(self) -> int:
        """What this process could still get beside what it holds."""

    @abstractmethod
    def outside(self) -> int:
        """Memory of the device in use but not in `now`: the CUDA context and other processes. 0 on CPU."""


class CpuMeter(Meter):
    """The resident set of this process."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._highest_seen = 0
        self._floor = 0
        # Ranks on one machine share its memory.
        self._num_ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def now(self) -> int:
        resident = host.resident_bytes()
        if resident > self._highest_seen:
            self._highest_seen = resident
        return resident

    def peak(self) -> int:
        highest = host.highest_resident_bytes()
        if self.can_reset_peak or highest > self._floor:
            return highest
        self.now()
        return self._highest_seen

    def reset_peak(self) -> None:
        self.can_reset_peak = host.reset_highest_resident()
        self._highest_seen = host.resident_bytes()
        self._floor = host.highest_resident_bytes()

    def allocated(self) -> int:
        return self.now()

    def allocated_peak(self) -> int:
        return self.peak()

    def release(self) -> None:
        host.release()
        limited = heap()
        if limited is not None:
            limited.settle()

    def show_what_lives(self, on: bool) -> None:
        limited = heap()
        if limited is not None:
            limited.return_at_once(on)

    def total(self) -> int:
        return host.total_bytes() // self._num_ranks

    def free(self) -> int:
        return host.free_bytes() // self._num_ranks

    def outside(self) -> int:
        return 0


class CudaMeter(Meter):
    """The caching allocator of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

    def now(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_reserved(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def allocated_peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def release(self) -> None:
        # Blocks that a kernel still uses cannot go back.
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def total(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]

    def free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def outside(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return max(0, total - free - self.now())


_METERS: dict[str, Callable[[torch.device], Meter]] = {"cpu": lambda device: CpuMeter(), "cuda": CudaMeter}


def meter(device: torch.device | str) -> Meter:
    """The meter of a device.

    Raises:
        BudgetError: Memfit cannot read the memory of that kind of device.
    """
    device = torch.device(device)
    make = _METERS.get(device.type)
    if make is not None:
        return make(device)
    raise BudgetError(
        f"The model is on `{device}`, whose memory Memfit cannot read: it knows `cpu` and `cuda`. Move the model there."
    )


def resolve_budget(
    budget: int | float | str | Budget | None, device: torch.device | str
) -> int | Literal["min"] | None:
    """What a budget comes to on a device, in bytes.

    Args:
        budget: As `units.parse_budget` takes it. `"auto"` is what the process holds and what is free, less a margin of
            10% of the free memory on CPU and 5% on CUDA. On CPU ranks of one machine share what is free.
        device: The device that the budget bounds.

    Returns:
        Bytes; `"min"` as it is; ``None`` for a budget that only measures.

    Raises:
        BudgetError: The budget cannot be read, or the device cannot be measured.
    """
    parsed = parse_budget(budget)
    match parsed.kind:
        case "none":
            return None
        case "min":
            return "min"
        case "auto":
            gauge = meter(device)
            return gauge.now() + int(gauge.free() * (1 - _AUTO_MARGIN[gauge.device.type]))
        case "percent":
            return int(meter(device).total() * (parsed.value or 0) / 100)
        case "bytes":
            return int(parsed.value or 0)


def resolve_budgets(
    budget: BudgetChoice, devices: Collection[torch.device]
) -> dict[torch.device, int | Literal["min"] | None]:
    """What a budget comes to on each of several devices: one budget holds for each, or each has its own.

    Raises:
        BudgetError: As `resolve_budget`; or a device has none, or one that is not the model's has.
    """
    parsed = parse_budgets(budget)
    if isinstance(parsed, Budget):
        return {device: resolve_budget(parsed, device) for device in devices}
    shown = ", ".join(f"`{device}`" for device in devices)
    named: dict[torch.device, Budget] = {}
    for name, each in parsed.items():
        meant = [d for d in devices if name in (str(d), str(d.index)) or (name == d.type and len(devices) == 1)]
        if not meant:
            raise BudgetError(f"The budget names `{name}`, and the model's blocks are on {shown}.", budget)
        if meant[0] in named:
            raise BudgetError(f"The budget names `{meant[0]}` twice, as `{name}` too.", budget)
        named[meant[0]] = each
    for device in devices:
        if device not in named:
            raise BudgetError(f"The budget says nothing of `{device}`, where blocks of the model are.", budget)
    return {device: resolve_budget(named[device], device) for device in devices}


def describe(device: torch.device | str) -> str:
    """A device in words: its name and its memory."""
    gauge = meter(device)
    name = torch.cuda.get_device_name(gauge.device) if gauge.device.type == "cuda" else f"CPU, {allocator()}"
    return f"{gauge.device} ({name}, {format_bytes(gauge.total())})"
