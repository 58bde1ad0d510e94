"""Names to devices."""

from __future__ import annotations

import functools
import re

from memfit.errors import UnknownNameError, UsageError
from memfit.hardware.amd import AMD
from memfit.hardware.apple import APPLE
from memfit.hardware.cpu import CPU
from memfit.hardware.entry import Hardware
from memfit.hardware.nvidia import NVIDIA
from memfit.hardware.records import HERE, calibrated
from memfit.names import nearest, plain

MAX_GPUS = 1 << 20
_COUNTED = re.compile(r"\s*([0-9]+)\s*[x×*]\s*(\S.*)", re.IGNORECASE)


@functools.cache
def entries() -> tuple[Hardware, ...]:
    """Every device that Memfit knows."""
    return (*NVIDIA, *AMD, *APPLE, *CPU)


@functools.cache
def _by_name() -> dict[str, Hardware]:
    return {plain(name): entry for entry in entries() for name in (entry.name, *entry.aliases)}


def find(name: str) -> Hardware:
    """The device of that name: ``rtx4090``, ``RTX 4090``, ``NVIDIA A100-SXM4-40GB``; ``here``: as calibrated.

    Raises:
        UnknownNameError: There is none; carries the nearest names. `a100` is two cards and so none.
        UsageError: `here` has not been calibrated.
        CalibrationError: It has, and the record cannot be read.
    """
    word = plain(name)
    if word == HERE:
        here = calibrated()
        if here is None:
            raise UsageError(f"`{HERE}` has not been measured: run `memfit doctor --calibrate` first.")
        return here
    found = _by_name().get(word) or _by_name().get(word.removeprefix("nvidia"))
    if found is not None:
        return found
    names = [entry.name for entry in entries()]
    # What is a beginning of names is too short: `a100`.
    near = tuple(entry for entry in names if word and plain(entry).startswith(word)) or nearest(name, names)
    raise UnknownNameError("device", name, near, None if near else f"Known are {', '.join(names)}.")


def parse_gpus(text: str) -> tuple[int, Hardware]:
    """How many devices, and which: ``64xh100`` is 64 of `h100`, ``rtx4090`` is one.

    Raises:
        UsageError: The number is 0 or beyond any machine.
        UnknownNameError: There is no such device.
    """
    match = _COUNTED.fullmatch(text)
    if match is None:
        return 1, find(text)
    count = int(match[1]) if len(match[1]) <= 10 else MAX_GPUS + 1
    if not 1 <= count <= MAX_GPUS:
        raise UsageError(f"`{text}` asks for {match[1]} devices: write a number from 1 to {MAX_GPUS}, as in `8xh100`.")
    return count, find(match[2])
