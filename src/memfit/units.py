"""Bytes, seconds and budgets as text.

GiB is 2^30 bytes, GB is 10^9. What a user types is read strictly: a budget that could mean two things is refused with
both readings. What Memfit prints has three significant digits, since a prediction has no more.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

from memfit.errors import BudgetError

BudgetKind = Literal["bytes", "percent", "auto", "min", "none"]

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|[A-Za-z]*)")
_BYTES_HINT = "Write bytes as an integer, or a size such as `6GiB` or `6.5 GB`."
_BUDGET_HINT = "Write a size such as `6GiB` or `6.5 GB`, a share such as `90%`, `auto`, `min` or `None`."
_DEVICES_HINT = "Write one budget for all devices, or each as in `cuda:0=20GiB,cuda:1=22GiB`."
_BARE_LIMIT = 2**20
"""Below this many bytes, text without a unit is more likely a forgotten unit than a number of bytes."""
_MAX_BYTES = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a user asked for, before the device is known.

    Attributes:
        kind: ``bytes``; ``percent`` of the device's memory; ``auto``: what is free, less a margin; ``min``: the
            smallest peak; ``none``: save everything and only measure.
        value: Bytes (an int) or percent (above 0, at most 100); ``None`` for the other kinds.
    """

    kind: BudgetKind
    value: int | float | None = None

    def __str__(self) -> str:
        if self.kind == "bytes":
            return format_bytes(self.value or 0)
        return f"{self.value:g}%" if self.kind == "percent" else self.kind


BudgetChoice = int | float | str | Budget | Mapping[Any, Any] | None
"""What says how much memory there is: for one device, or a mapping that says it for each."""


def parse_bytes(value: str | float | SupportsIndex) -> int:
    """Read a size in bytes.

    Args:
        value: Bytes as an integer (or a float without a fraction, such as ``6e9``), or text with a unit: ``6GiB``,
            ``6.5 GB``. Upper and lower case are the same. Fractions of a byte are cut off.

    Returns:
        At least 1.

    Raises:
        BudgetError: Not a size, not above zero, or ambiguous; the message says the way out.
    """
    return _parse_bytes(value, _BYTES_HINT)


def parse_budget(value: str | float | SupportsIndex | Budget | None) -> Budget:
    """Read a budget: a size, ``90%``, ``auto``, ``min`` or ``None``.

    Args:
        value: What the user gave. Text ``none`` is the same as ``None``, so that a command line can say it.

    Raises:
        BudgetError: The budget cannot be read; the message names it and the way out.
    """
    if isinstance(value, Budget):
        return value
    if value is None:
        return Budget(kind="none")
    if isinstance(value, str):
        text = value.strip().lower()
        for word in ("auto", "min", "none"):
            if text == word:
                return Budget(kind=word)
        match = _NUMBER.fullmatch(text)
        if match and match[2] == "%":
            percent = float(match[1])
            if not 0 < percent <= 100:
                raise BudgetError(
                    f"Budget `{value}` is not a share of the memory: write one above `0%`, at most `100%`.", value
                )
            return Budget(kind="percent", value=percent)
    return Budget(kind="bytes", value=_parse_bytes(value, _BUDGET_HINT))


def parse_budgets(value: BudgetChoice) -> Budget | dict[str, Budget]:
    """Read a budget, or one for each of several devices.

    Args:
        value: What `parse_budget` takes; or a mapping from devices (``"cuda:0"``, ``0``) to that; or the same as text,
            ``"cuda:0=20GiB,cuda:1=22GiB"``.

    Returns:
        Of a mapping: by the device's name, or its number as text.

    Raises:
        BudgetError: As `parse_budget`; or a device is named twice, or none is.
    """
    pairs: list[tuple[object, Any]]
    if isinstance(value, Mapping):
        pairs = list(value.items())
        if not pairs:
            raise BudgetError(f"Budget `{{}}` names no device. {_DEVICES_HINT}", value)
    elif isinstance(value, str) and "=" in value:
        pairs = [(name, size) for name, _, size in (part.partition("=") for part in value.split(","))]
    else:
        return parse_budget(value)
    found: dict[str, Budget] = {}
    for device, size in pairs:
        name = str(device).strip().lower()
        if not name:
            raise BudgetError(f"Budget `{_shown(value)}` leaves out a device. {_DEVICES_HINT}", value)
        if name in found:
            raise BudgetError(f"Budget `{_shown(value)}` names `{name}` twice. {_DEVICES_HINT}", value)
        found[name] = parse_budget(size)
    return found


def format_bytes(num_bytes: float) -> str:
    """Three significant digits in B, KiB, MiB, GiB or TiB: ``6.29 GiB``."""
    if not math.isfinite(num_bytes):
        return f"{num_bytes} B"
    sign, size = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    if size < 1000:
        return f"{sign}{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 999.5 or unit == "TiB":
            break
    return f"{sign}{_three_digits(size)} {unit}"


def format_seconds(seconds: float) -> str:
    """Three significant digits in ns, µs, ms or s: ``142 ms``; from two minutes on ``3 min 20 s`` and ``1 h 5 min``."""
    if not math.isfinite(seconds):
        return f"{seconds} s"
    sign, size = ("-", -seconds) if seconds < 0 else ("", seconds)
    if size == 0:
        return "0 s"
    if size >= 119.5:
        minutes, rest = divmod(round(size), 60)
        if minutes < 60:
            return f"{sign}{minutes} min {rest} s"
        hours, minutes = divmod(round(size / 60), 60)
        return f"{sign}{hours} h {minutes} min"
    size *= 1e9
    for unit in ("ns", "µs", "ms"):
        if size < 999.5:
            return f"{sign}{_three_digits(size)} {unit}"
        size /= 1000
    return f"{sign}{_three_digits(size)} s"


def format_rate(per_second: float, unit: str) -> str:
    """Three significant digits with a power of ten: ``165 TFLOP/s``, ``51.2 GB/s``."""
    return f"{format_count(per_second, unit)}/s"


def format_count(number: float, unit: str) -> str:
    """Three significant digits with a power of ten: ``44.8 TFLOP``."""
    size = number
    for prefix in ("", "k", "M", "G", "T", "P"):
        if size < 999.5 or prefix == "P":
            break
        size /= 1000
    return f"{_three_digits(size)} {prefix}{unit}"


def _three_digits(size: float) -> str:
    """``size`` from 0 to 999.5, or more, with three significant digits and no exponent."""
    if size >= 99.95:
        return f"{size:.0f}"
    if size >= 9.995:
        return f"{size:.1f}"
    return f"{size:.2f}" if size >= 0.9995 else f"{size:.3g}"


def _parse_bytes(value: object, hint: str) -> int:
    if isinstance(value, str):
        return _checked(_parse_text(value, hint), value, hint)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BudgetError(f"Budget `{value}` is not a finite number of bytes. {hint}", value)
        if not value.is_integer():
            raise BudgetError(f"Budget `{value}` is a fraction of a byte. {hint}", value)
        return _checked(int(value), value, hint)
    if not isinstance(value, bool) and isinstance(value, SupportsIndex):
        try:
            return _checked(operator.index(value), value, hint)
        except TypeError:
            pass  # an array with several elements has `__index__` and refuses here
    raise BudgetError(f"Budget `{_shown(value)}` is not a size. {hint}", value)


def _parse_text(text: str, hint: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        wrong = "above zero" if text.strip().startswith("-") else "a size"
        raise BudgetError(f"Budget `{_shown(text)}` is not {wrong}. {hint}", text)
    number, unit = match[1], match[2].lower()
    if unit in ("k", "m", "g", "t"):
        power = "kmgt".index(unit) + 1
        both = f"`{number} {unit.upper()}iB` (2^{10 * power}) or `{number} {unit.upper()}B` (10^{3 * power})"
        raise BudgetError(f"Budget `{_shown(text)}` could be two sizes: write {both}.", text)
    whole, _, fraction = number.partition(".")
    whole, fraction = (
        (whole.lstrip("0") or "0")[:40],
        fraction[:24],
    )  # more digits change no size that passes the limits
    if unit == "":
        if "." in number or 0 < int(whole) < _BARE_LIMIT:
            raise BudgetError(f"Budget `{_shown(text)}` has no unit: write `{number} GiB` or `{number} MiB`.", text)
        unit = "b"
    if unit not in _UNITS:
        raise BudgetError(f"Budget `{_shown(text)}` has no unit that Memfit knows. {hint}", text)
    scale: int = 10 ** len(fraction)
    return int(whole + fraction) * _UNITS[unit] // scale


def _checked(num_bytes: int, value: object, hint: str) -> int:
    if num_bytes < 1:
        raise BudgetError(f"Budget `{_shown(value)}` is not above zero. {hint}", value)
    if num_bytes > _MAX_BYTES:
        raise BudgetError(f"Budget `{_shown(value)}` is more than any machine has. {hint}", value)
    return num_bytes


def _shown(value: object) -> str:
    """``value`` in at most 80 characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception:  # a user's `__repr__`, or an integer of more digits than Python prints
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
