"""What a step would cost with a chunked loss, as far as the step with a plain one tells."""

from __future__ import annotations

from dataclasses import replace

from memfit.plans import Plan
from memfit.profiles import StepProfile

CHUNKED_SHARE = 0.05
"""Of what the plain loss needs beyond the forward: at most that much the chunked one needs."""
LEAST_SHARE = 0.01
"""Of a step's time, or of its peak: less is no reason to change the order of sums."""


def with_chunked_loss(profile: StepProfile, *, gradient_bytes: int) -> StepProfile | None:
    """The profile without the logits at the loss.

    Later events stay as they are, although the logits that a model returns are alive there: what it says of the
    chunked loss is the least that this does.

    Args:
        profile: Of a step with a plain loss.
        gradient_bytes: Of the head's gradient, which a chunked loss has made when it is over.

    Returns:
        ``None`` where the step has no loss that needs more than this.
    """
    places = [i for i, event in enumerate(profile.events) if event.kind == "outside" and event.name == "loss"]
    if not places or not places[0]:
        return None
    loss = profile.events[places[0]]
    before = profile.events[places[0] - 1].outside_bytes
    needed = before + gradient_bytes + int(CHUNKED_SHARE * max(0, loss.outside_bytes - before))
    if needed >= loss.outside_bytes:
        return None
    events = list(profile.events)
    events[places[0]] = replace(loss, outside_bytes=needed)
    return replace(profile, events=tuple(events))


def pays(chunked: Plan | None, plain: Plan | None, profile: StepProfile, *, smallest: bool) -> bool:
    """Whether a chunked loss is worth it: a plan where there was none, less recomputation, or a smaller peak.

    Args:
        chunked: The plan with it; ``None``: none fits.
        plain: The plan without it; ``None``: none fits.
        profile: Of the step.
        smallest: Whether the smallest peak was asked for.
    """
    if chunked is None or plain is None:
        return chunked is not None
    if smallest:
        return chunked.predicted_peak_bytes < (1 - LEAST_SHARE) * plain.predicted_peak_bytes
    programs = [profile.programs[call.program] for call in profile.calls]
    step_seconds = profile.outside_seconds + sum(p.forward_seconds + p.backward_seconds for p in programs)
    return plain.recompute_seconds - chunked.recompute_seconds > LEAST_SHARE * step_seconds
