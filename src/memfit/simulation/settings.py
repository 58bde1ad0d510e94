"""The best that a training stack's own switches come to within a budget: each of its settings, priced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memfit.plans import Plan
from memfit.predictions import Prediction
from memfit.simulation.pricing import Pricing
from memfit.solver.planner import make_plan, switched
from memfit.solver.special import attention_policy
from memfit.solver.switches import every_nth
from memfit.stacks import Gain, Setting, Situation, Stack, StackSetting

_WORDS = {
    "nothing": "nothing is recomputed",
    "full": "full checkpointing",
    "attention": "full checkpointing, attention saved",
    "offload": "hidden-state offload",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    setting: Setting
    number: int
    plan: Plan
    fits: bool


def best_setting(stack: Stack, pricing: Pricing, prediction: Prediction, situation: Situation) -> StackSetting:
    """The fastest setting of a stack whose highest peak fits; where none does, the one with the smallest peak.

    A setting that drops the random state is taken only where blocks draw nothing, or no other fits.

    Args:
        stack: Whose settings.
        pricing: Of the step.
        prediction: Of Memfit's plan for it, which has the budget.
        situation: Of the step.
    """
    found = list(_candidates(stack, pricing, prediction.budget_bytes, situation))
    best = min(
        found,
        key=lambda each: (
            not each.fits,
            each.fits and situation.draws and each.setting.drops_random_state,
            pricing.seconds(each.plan) if each.fits else 0.0,
            each.plan.predicted_peak_bytes,
        ),
    )
    setting = best.setting
    peak, seconds = pricing.expected(best.plan), pricing.seconds(best.plan)
    beside = tuple(remark.text for remark in stack.beside if remark.holds(situation))
    return StackSetting(
        name=stack.name,
        versions=stack.versions,
        place=stack.place,
        setting=every_nth(best.number) if setting.kind == "every_n" else _WORDS[setting.kind],
        lines=(*setting.paste(best.number), *beside),
        fits=best.fits,
        peak_bytes=peak,
        step_seconds=seconds,
        gain=Gain(step_ratio=seconds / prediction.step_seconds, peak_bytes=peak - prediction.peak.expected),
        warnings=tuple(remark.text for remark in (*setting.warnings, *stack.warnings) if remark.holds(situation)),
    )


def _candidates(stack: Stack, pricing: Pricing, budget: int, situation: Situation) -> Iterator[_Candidate]:
    for setting in stack.settings:
        if setting.tasks and situation.task not in setting.tasks:
            continue
        for number, plan in _plans(setting, pricing):
            fits = pricing.limit(plan.predicted_peak_bytes) <= budget
            yield _Candidate(setting=setting, number=number, plan=plan, fits=fits)


def _plans(setting: Setting, pricing: Pricing) -> Iterator[tuple[int, Plan]]:
    """The plans that a setting comes to, by the number that goes into its lines."""
    profile = pricing.profile
    if setting.kind == "every_n":
        for number in range(2, len({call.name for call in profile.calls}) + 1):
            yield number, switched(profile, every_n_layers=number)
    elif setting.kind == "attention":
        made = {key: attention_policy(program) for key, program in profile.programs.items()}
        yield 1, make_plan(profile, [made[call.program] for call in profile.calls], budget_bytes=None)
    elif setting.kind == "offload":
        plan = pricing.offload_plan(in_flight=setting.in_flight, overlaps=setting.overlaps)
        if plan is not None:
            yield 1, plan
    else:
        yield 1, switched(profile, policy="plain" if setting.kind == "nothing" else "full")
