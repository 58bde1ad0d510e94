"""What `memfit doctor --calibrate` measured, in the user's cache folder.

One file, `hardware.json`: when, with which versions, on what, and the rates. It is checked field by field when read;
what is not such a record is refused and named, never half believed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from memfit.errors import CalibrationError
from memfit.files import write_whole
from memfit.hardware.entry import DTYPES, SOURCED, Backend, Dtype, Hardware

SCHEMA_VERSION = 2
HERE = "here"
"""Name of the machine at hand, as calibrated."""

_MAX_FILE_BYTES = 1 << 20
_MAX_TEXT = 4096
_AGAIN = "Run `memfit doctor --calibrate` again."


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """One calibration.

    Attributes:
        date: When, as ``2026-01-31T12:00:00+00:00``.
        device: What was measured, as torch or the system names it.
        num_threads: That torch used on the host.
        memfit: Version.
        torch: Version.
        hardware: The rates; its name is `here`.
        schema_version: Of the JSON form.
    """

    date: str
    device: str
    num_threads: int
    memfit: str
    torch: str
    hardware: Hardware
    schema_version: int = SCHEMA_VERSION


def record_path() -> Path:
    """Where the record lies: `hardware.json` in `$XDG_CACHE_HOME/memfit`, or in `~/.cache/memfit`."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(folder) if os.path.isabs(folder) else Path.home() / ".cache") / "memfit" / "hardware.json"


def calibrated(path: Path | None = None) -> Hardware | None:
    """The machine at hand as it was measured, named `here`; ``None`` where it was not.

    Raises:
        CalibrationError: There is a record, and it cannot be read.
    """
    record = load_record(path)
    return None if record is None else record.hardware


def save_record(record: CalibrationRecord, path: Path | None = None) -> Path:
    """Write a record, whole or not at all.

    Returns:
        Where it lies.

    Raises:
        CalibrationError: The file cannot be written.
    """
    target = record_path() if path is None else path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, json.dumps(asdict(record), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise CalibrationError(str(target), f"It cannot be written: {error.strerror}.") from error
    return target


def load_record(path: Path | None = None) -> CalibrationRecord | None:
    """Read the record; ``None`` where there is none.

    Raises:
        CalibrationError: It is not a record of this schema version.
    """
    source = record_path() if path is None else path
    try:
        with open(source, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CalibrationError(str(source), f"It cannot be read: {error.strerror}.") from error
    try:
        if len(content) > _MAX_FILE_BYTES:
            raise ValueError(f"it has more than {_MAX_FILE_BYTES} bytes")
        return _read(json.loads(content.decode("utf-8"), parse_constant=_refuse))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise CalibrationError(str(source), f"It is no calibration that can be used: {error}. {_AGAIN}") from None


def _refuse(name: str) -> float:
    raise ValueError(f"`{name}` is not a number")


def _read(value: object) -> CalibrationRecord:
    entry = _fields(value, "the record", [field.name for field in fields(CalibrationRecord)])
    if entry["schema_version"] != SCHEMA_VERSION:
        version = json.dumps(entry["schema_version"])[:20]
        raise ValueError(f"its schema version is {version}, and this Memfit reads {SCHEMA_VERSION}")
    return CalibrationRecord(
        date=_text(entry["date"], "date"),
        device=_text(entry["device"], "device"),
        num_threads=_count(entry["num_threads"], "num_threads"),
        memfit=_text(entry["memfit"], "memfit"),
        torch=_text(entry["torch"], "torch"),
        hardware=_read_hardware(entry["hardware"]),
    )


def _read_hardware(value: object) -> Hardware:
    entry = _fields(value, "`hardware`", [field.name for field in fields(Hardware)])
    backend, aliases = _text(entry["backend"], "backend"), entry["aliases"]
    if backend not in ("cuda", "mps", "cpu"):
        raise ValueError(f"`backend` is `{backend[:20]}`")
    if not isinstance(aliases, list):
        raise ValueError("`aliases` is not a list")
    rates = entry["matmul_flops_per_second"]
    if not isinstance(rates, dict) or "fp32" not in rates or not set(rates) <= set(DTYPES):
        raise ValueError("`matmul_flops_per_second` does not go by dtype, or lacks fp32")
    numbers = {name: _positive(entry[name], name) for name in SOURCED if name not in _NOT_FLOAT}
    sources = _fields(entry["sources"], "`sources`", SOURCED)
    return Hardware(
        name=_text(entry["name"], "name"),
        aliases=tuple(_text(alias, "aliases") for alias in aliases),
        backend=cast(Backend, backend),
        memory_bytes=_count(entry["memory_bytes"], "memory_bytes"),
        matmul_flops_per_second=cast(
            Mapping[Dtype, float], {name: _positive(rate, f"rate of {name}") for name, rate in rates.items()}
        ),
        sources={name: _text(text, f"sources.{name}") for name, text in sources.items()},
        host_link_bytes_per_second=_positive_or_none(entry["host_link_bytes_per_second"], "host_link_bytes_per_second"),
        interconnect_bytes_per_second=_positive_or_none(
            entry["interconnect_bytes_per_second"], "interconnect_bytes_per_second"
        ),
        network_bytes_per_second=_positive_or_none(entry["network_bytes_per_second"], "network_bytes_per_second"),
        **numbers,
    )


_NOT_FLOAT = {
    *("memory_bytes", "matmul_flops_per_second"),
    *("host_link_bytes_per_second", "interconnect_bytes_per_second", "network_bytes_per_second"),
}


def _fields(value: object, where: str, names: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    if set(value) != set(names):
        wrong = sorted(set(value) ^ set(names))[0]
        raise ValueError(f"{where} {'has the unknown' if wrong in value else 'lacks the'} field `{wrong[:80]}`")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError(f"`{where}` is not printable text")
    return value


def _count(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**62:
        raise ValueError(f"`{where}` is not a whole number above zero")
    return value


def _positive(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"`{where}` is not a number above zero")
    return float(value)


def _positive_or_none(value: object, where: str) -> float | None:
    return None if value is None else _positive(value, where)
