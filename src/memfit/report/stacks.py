"""The best setting of a training stack as text: lines to paste, what they come to, and what is wrong with them."""

from __future__ import annotations

from memfit.stacks import StackSetting
from memfit.units import format_bytes, format_seconds


def render_setting(stack: StackSetting) -> list[str]:
    """As lines of a prediction."""
    fits = "" if stack.fits else ", does not fit"
    costs = f"{format_bytes(stack.peak_bytes)} expected, {format_seconds(stack.step_seconds)}"
    lines = [f"for {stack.name} ({stack.versions}): {stack.setting}, {costs}{fits}"]
    if stack.lines:
        lines += [f"  {stack.place}:", *(f"    {line}" for line in stack.lines)]
    else:
        lines.append("  nothing to switch on")
    lines.append(f"  memfit: {_gain(stack)}")
    return [*lines, *(f"  warning: {sentence}" for sentence in stack.warnings)]


def _gain(stack: StackSetting) -> str:
    saved, ratio = stack.gain.peak_bytes, stack.gain.step_ratio
    words = f"{ratio:.2f} times as fast" if ratio >= 1 else f"{1 / ratio:.2f} times as slow"
    if saved == 0:
        return f"{words}, at the same peak"
    return f"{words}, at a peak {format_bytes(abs(saved))} {'lower' if saved > 0 else 'higher'}"
