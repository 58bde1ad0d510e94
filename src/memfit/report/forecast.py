"""Predictions as text: the answer first, what it consists of, today's switches beside it, and what is not counted."""

from __future__ import annotations

from collections.abc import Sequence

from memfit.predictions import Alternative, Prediction
from memfit.report.formulas import render_comparison
from memfit.report.stacks import render_setting
from memfit.report.text import columns
from memfit.units import format_bytes, format_seconds

_PARTS = {
    "weights": "weights, buffers and the batch",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "saved_tensors": "saved by blocks for the backward",
    "loss": "head, logits and loss",
    "outside_blocks": "elsewhere outside the blocks: embeddings, gathered weights, temporaries of the optimizer",
    "workspace": "what that moment works with",
    "process": "the process itself",
    "allocator_slack": "held by the allocator beside tensors",
}


def render_prediction(prediction: Prediction, *, explain: bool = False) -> str:
    """One prediction, without a newline at its end."""
    peak = prediction.peak
    sizes = peak.low, peak.expected, peak.high, prediction.budget_bytes
    low, expected, high, budget = map(format_bytes, sizes)
    verdict = "fits" if prediction.fits else "too large"
    lines = [
        f"{verdict:<10} {prediction.model} on {prediction.device}: at most {high} of {budget}",
        *_instead(prediction),
        f"{'peak':<10} {low} – {expected} – {high} (low, expected, high), at the {peak.event}",
    ]
    lines += [f"  {format_bytes(peak.parts[key]):>9}  {words}" for key, words in _PARTS.items() if peak.parts.get(key)]
    tokens = "" if prediction.tokens_per_second is None else f", {prediction.tokens_per_second:,.0f} tokens/s"
    lines.append(f"{'step':<10} {format_seconds(prediction.step_seconds)}{tokens}")
    plan = prediction.plan
    lines.append(
        f"{'plan':<10} saves {format_bytes(plan.saved_bytes)}, recomputes {format_bytes(plan.recomputed_bytes)} in "
        f"{format_seconds(plan.recompute_seconds)}"
    )
    lines.append(
        f"{'compute':<10} {prediction.compute_factor:.2f} forwards a step; {prediction.num_trainable:,} of "
        f"{prediction.num_parameters:,} parameters train"
    )
    if explain:
        lines += _explained(prediction)
    rows = [
        *prediction.alternatives,
        Alternative(
            name="memfit", peak_bytes=peak.expected, step_seconds=prediction.step_seconds, fits=prediction.fits
        ),
    ]
    lines += ["", *_table(rows)]
    if prediction.stack is not None:
        lines += ["", *render_setting(prediction.stack)]
    lines += ["", *(f"not counted: {sentence}" for sentence in prediction.not_counted)]
    return "\n".join(lines)


def render_frontier(predictions: Sequence[Prediction]) -> str:
    """One row for each peak, from the smallest."""
    first = predictions[0]
    header = ("peak", "at most", "step", "tokens/s", "saves", "recomputes", "")
    cells = [
        (
            format_bytes(each.peak.expected),
            format_bytes(each.peak.high),
            format_seconds(each.step_seconds),
            "" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
            format_bytes(each.plan.saved_bytes),
            format_bytes(each.plan.recomputed_bytes),
            _unless(each.fits),
        )
        for each in predictions
    ]
    title = f"{first.model} on {first.device}, which has {format_bytes(first.budget_bytes)}"
    return "\n".join([title, *columns([header, *cells], left={len(header) - 1})])


def _instead(prediction: Prediction) -> list[str]:
    """Where the plan does not fit: the fastest of the alternatives that do."""
    fitting = [each for each in prediction.alternatives if each.fits and not prediction.fits]
    if not fitting:
        return []
    best = min(fitting, key=lambda each: each.step_seconds)
    costs = f"{format_bytes(best.peak_bytes)} expected, {format_seconds(best.step_seconds)} a step"
    return [f"{'fits with':<10} {best.name}: {costs}"]


def _explained(prediction: Prediction) -> list[str]:
    """The FLOPs of a step."""
    counted = prediction.forward_flops + prediction.backward_flops + prediction.recomputed_flops
    rows = [
        ("forward", prediction.forward_flops),
        ("backward", prediction.backward_flops),
        ("recomputed", prediction.recomputed_flops),
        ("all", counted),
    ]
    lines = [f"  {flops / 1e12:>9.2f}  TFLOPs {name}, of one micro-batch, counted op by op" for name, flops in rows]
    return lines if prediction.formula is None else [*lines, *render_comparison(prediction.formula)]


def _table(rows: Sequence[Alternative]) -> list[str]:
    cells = [
        (row.name, format_bytes(row.peak_bytes), format_seconds(row.step_seconds), _unless(row.fits)) for row in rows
    ]
    return columns([("switch", "peak", "step", ""), *cells], left={0, 3})


def _unless(fits: bool) -> str:
    return "" if fits else "does not fit"
