"""The report as text: answer first, rows that add up, three significant digits, every number predicted or measured.

A summary is plain data, `Handle.summary()`. Keys that `render` reads, bytes and seconds, ``None`` or absent where
unknown:

- ``budget`` (a word such as `min`), ``budget_bytes``, ``predicted_peak_bytes``, ``measured_peak_bytes``,
  ``plain_peak_bytes``, ``peak_event``
- ``static_bytes``, ``working_bytes``: parts of the predicted peak; what remains is saved by blocks
- ``context_bytes``: the CUDA context, which no budget covers
- ``step_seconds``, ``recompute_seconds``, ``saved_bytes``, ``recomputed_bytes``, ``steps``
- ``model_flops``, ``hardware_flops``, ``tflops_per_second``, ``model_flop_utilization``, ``hardware_flop_utilization``
- ``model``, ``device``, and ``notes``, a list of sentences
- ``devices``: of a model on several, for each its ``device``, and the budget and peaks that are its own
- ``blocks``: one entry per block call with ``name``, ``mode``, ``reason``, ``parent``, ``saved_bytes``,
  ``recomputed_bytes``
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from memfit.plans import Plan
from memfit.report.blocks import BlockRow, fold
from memfit.units import format_bytes, format_count, format_rate, format_seconds

_UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}


def render(summary: Mapping[str, Any]) -> str:
    """The report of one fitted model, without a newline at its end."""
    lines = [
        *_peak_lines(summary),
        *_plain_line(summary),
        *_step_line(summary),
        *_plan_line(summary),
        *_compute_lines(summary),
    ]
    if summary.get("context_bytes"):
        lines.append(_line("context", format_bytes(summary["context_bytes"]), "CUDA context, outside the budget"))
    lines += [f"note       {note}" for note in summary.get("notes") or ()]
    blocks = fold(summary.get("blocks") or ())
    if blocks:
        lines += ["", *_table(blocks)]
    return "\n".join(lines)


def render_json(summary: Mapping[str, Any]) -> str:
    """The same data as JSON: raw bytes and seconds, units in the keys."""
    return json.dumps(summary, indent=2, allow_nan=False)


def render_plan(plan: Plan) -> str:
    """A plan as text. All of it is predicted."""
    summary: dict[str, Any] = {
        "budget_bytes": plan.budget_bytes,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "plain_peak_bytes": plan.plain_peak_bytes,
        "recompute_seconds": plan.recompute_seconds,
        "saved_bytes": plan.saved_bytes,
        "recomputed_bytes": plan.recomputed_bytes,
        "peak_event": plan.peak_event,
    }
    calls = Counter(call.policy for call in plan.calls)
    noun = "policy" if len(calls) == 1 else "policies"
    return f"{render(summary)}\n{_line('blocks', str(len(plan.calls)), f'block calls, {len(calls)} {noun}')}"


def _line(label: str, value: str, words: str = "") -> str:
    return f"{label:<10} {value:<9} {words}".rstrip()


def _peak_lines(summary: Mapping[str, Any]) -> list[str]:
    peak = _peak(summary)
    if peak is None:
        return ["peak       not known: no training step has ended"]
    unit = _split(format_bytes(peak))[1]
    devices = [each for each in summary.get("devices") or () if _peak(each) is not None]
    own = [_peak_line(f"  {each['device']}", {**each, "budget": None}) for each in devices]
    return [_peak_line("peak", summary), *own, *_part_lines(summary, peak, unit)]


def _peak(summary: Mapping[str, Any]) -> int | None:
    """Measured, else predicted."""
    measured: int | None = summary.get("measured_peak_bytes")
    return summary.get("predicted_peak_bytes") if measured is None else measured


def _peak_line(label: str, summary: Mapping[str, Any]) -> str:
    peak = _peak(summary) or 0
    predicted, measured = summary.get("predicted_peak_bytes"), summary.get("measured_peak_bytes")
    value, unit = _split(format_bytes(peak))
    words: list[str] = []
    budget = summary.get("budget_bytes")
    if isinstance(budget, int):
        words.append(f"of {_align(budget, unit)},")
    words.append("predicted" if measured is None else "measured")
    if measured is not None and predicted is not None:
        words.append(f"(predicted {_align(predicted, unit, with_unit=False)})")
    text = " ".join(words)
    if summary.get("devices"):
        text += f", {len(summary['devices'])} devices together"
    elif summary.get("peak_event"):
        text += f", at the {summary['peak_event']}"
    if summary.get("budget"):
        text += f"; budget `{summary['budget']}`"
    if isinstance(budget, int) and peak > budget:
        text += f"; {format_bytes(peak - budget)} over the budget"
    return _line(label, f"{value} {unit}", text)


def _part_lines(summary: Mapping[str, Any], peak: int, unit: str) -> list[str]:
    """What the peak consists of. The rows add up to the peak in the digits shown."""
    predicted, static, working = (summary.get(f"{key}_bytes") for key in ("predicted_peak", "static", "working"))
    if predicted is None or static is None or working is None:
        return []
    num_blocks = len({block["name"] for block in summary.get("blocks") or ()})
    parts = [
        ("static", static, "parameters, gradients, optimizer state, predicted"),
        ("saved", predicted - static - working, f"by {num_blocks} blocks, predicted"),
        ("working", working, "of that event, predicted"),
    ]
    if peak != predicted:
        parts.append(("other", peak - predicted, "measured but not predicted"))
    decimals = _decimals(_split(format_bytes(peak))[0])
    shown = _round_to_sum([size / _UNITS[unit] for _, size, _ in parts], peak / _UNITS[unit], decimals)
    return [
        _line(f"  {name}", f"{number:.{decimals}f} {unit}", words)
        for (name, _, words), number in zip(parts, shown, strict=True)
        if name != "other" or round(number, decimals) != 0
    ]


def _plain_line(summary: Mapping[str, Any]) -> list[str]:
    plain = summary.get("plain_peak_bytes")
    # Without a plan everything was saved: the peak itself is the plain one.
    return (
        []
        if plain is None or summary.get("predicted_peak_bytes") is None
        else [_line("plain", format_bytes(plain), "predicted peak if everything were saved")]
    )


def _step_line(summary: Mapping[str, Any]) -> list[str]:
    step, extra = summary.get("step_seconds"), summary.get("recompute_seconds")
    if step is None:
        return [] if extra is None else [_line("step", f"+{format_seconds(extra)}", "recomputation, predicted")]
    steps = summary.get("steps") or 0
    words = "measured" + (f" over {steps} step{'' if steps == 1 else 's'}" if steps else "")
    if extra is not None:
        share = f" (+{100 * extra / (step - extra):.1f}%)" if step > extra else ""
        words += f", {format_seconds(extra)} of it recomputation{share}, predicted"
    return [_line("step", format_seconds(step), words)]


def _plan_line(summary: Mapping[str, Any]) -> list[str]:
    saved, recomputed = summary.get("saved_bytes"), summary.get("recomputed_bytes")
    if saved is None or recomputed is None or saved + recomputed == 0:
        return []
    # Rounded once, so that the two shares add up.
    share = round(100 * saved / (saved + recomputed))
    total = format_bytes(saved + recomputed)
    return [f"plan       save {share}%, recompute {100 - share}% of the {total} saved in blocks, predicted"]


def _compute_lines(summary: Mapping[str, Any]) -> list[str]:
    model, hardware, rate = (summary.get(f"{key}") for key in ("model_flops", "hardware_flops", "tflops_per_second"))
    if model is None:
        return []
    again = "" if hardware is None else f", {format_count(hardware, 'FLOP')} with recomputation"
    lines = [_line("compute", format_count(model, "FLOP"), f"forward and backward of a step{again}, counted")]
    if rate is not None:
        words = "measured"
        shares = summary.get("model_flop_utilization"), summary.get("hardware_flop_utilization")
        if shares[0] is not None:
            also = "" if shares[1] is None else f", {100 * shares[1]:.1f}% with recomputation (HFU)"
            words += f", {100 * shares[0]:.1f}% of what the device can (MFU){also}"
        lines.append(_line("rate", format_rate(rate * 1e12, "FLOP"), words))
    return lines


def _table(rows: Sequence[BlockRow]) -> list[str]:
    header = ("blocks", "calls", "mode", "save", "recompute", "reason")
    cells = [
        (
            f"  {row.name}" if row.is_child else row.name,
            str(row.num_calls),
            row.mode,
            "" if row.saved_bytes is None else format_bytes(row.saved_bytes),
            "" if row.recomputed_bytes is None else format_bytes(row.recomputed_bytes),
            row.reason,
        )
        for row in rows
    ]
    return columns([header, *cells], left={0, 2, 5})


def columns(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Rows of a table, the header first: numbers end, and the columns of ``left`` begin, one below the other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:<{width}}" if column in left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _split(text: str) -> tuple[str, str]:
    number, _, unit = text.partition(" ")
    return number, unit


def _decimals(number: str) -> int:
    return len(number.partition(".")[2])


def _align(num_bytes: int, unit: str, *, with_unit: bool = True) -> str:
    """A size next to another one: in its unit where that keeps three digits, else in its own."""
    text = format_bytes(num_bytes)
    if text.endswith(f" {unit}"):
        return text if with_unit else _split(text)[0]
    return text


def _round_to_sum(numbers: Sequence[float], total: float, decimals: int) -> list[float]:
    """Round each number so that their sum is the rounded total: the largest remainders go up."""
    scale: int = 10**decimals
    floors = [int(number * scale // 1) for number in numbers]
    missing = round(round(total, decimals) * scale) - sum(floors)
    order = sorted(range(len(numbers)), key=lambda i: floors[i] - numbers[i] * scale)
    for index in order[: max(0, missing)]:
        floors[index] += 1
    return [floor / scale for floor in floors]
