"""Models whose layers lie on several devices (`device_map`): a budget, a plan and a handle for each of them.

NOTE [Devices]: such a model runs on one device after the other, and what one holds is nothing to the others. So a step
is planned for each device by itself, from its own block calls and its own memory: chains are split there. For that no
recipe may reach into another device. An op that reads one and writes another is a boundary (`ops.crosses_devices`): its
result is saved where it is. A block whose parameters are on several devices is split into its children; one that
computes elsewhere than on the device of its weights (`Program.strays`) is split likewise, or runs again as a whole.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch

from memfit.blocks import find_blocks, replayable_children
from memfit.causal import head_of
from memfit.errors import ModelError
from memfit.exhaustion import Exhaustion
from memfit.plans import Plan, Policy
from memfit.slack import Slack
from memfit.training import TrainingState

_SUMS = (
    "predicted_peak_bytes",
    "measured_peak_bytes",
    "plain_peak_bytes",
    "context_bytes",
    "recompute_seconds",
    "saved_bytes",
    "recomputed_bytes",
)
"""Of a summary: what all devices take together. Each reaches its own peak, at a moment of its own."""
_OF_ONE = (
    "hardware_flops",
    "hardware_tflops_per_second",
    "model_flop_utilization",
    "hardware_flop_utilization",
)
"""Of a summary: what only the rates and the recomputation of one device say."""
_OWN = ("device", "budget_bytes", "budget", "predicted_peak_bytes", "measured_peak_bytes", "plain_peak_bytes")


class Part(ABC):
    """A handle among those of one model, of which the first speaks for all: one for each device."""

    exhaustion: Exhaustion
    training: TrainingState
    _slack: Slack

    def __init__(self) -> None:
        """The only one, so far."""
        self._lead: weakref.ref[Self] | None = None
        self._others: list[Self] = []
        self._again = False

    def join(self, lead: Self | None) -> None:
        """This handle is whole; it comes after ``lead``."""
        if lead is not None:
            self._lead = weakref.ref(lead)
            lead._others.append(self)

    @property
    def lead(self) -> Self:
        """The first of the model's handles."""
        return (None if self._lead is None else self._lead()) or self

    @property
    def parts(self) -> list[Self]:
        """This handle, and those of the model's other devices."""
        return [self, *self._others]

    @property
    @abstractmethod
    def own_plan(self) -> Plan | None:
        """Of this device."""

    @abstractmethod
    def own_summary(self) -> dict[str, Any]:
        """Of this device."""

    @property
    def plan(self) -> Plan | None:
        """What was decided, for the largest step so far, on all devices; ``None`` before the second."""
        plans = [plan for part in self.parts if (plan := part.own_plan) is not None]
        return merged_plan(plans) if len(plans) > 1 else plans[0] if plans else None

    def summary(self) -> dict[str, Any]:
        """The report as data that `json.dumps` takes: raw bytes and seconds, ``None`` where unknown."""
        summaries = [part.own_summary() for part in self.parts]
        return merged_summary(summaries) if self._others else summaries[0]

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer steps any parameter of the model, on whatever device."""
        return any(part.training.owns(optimizer) for part in self.lead.parts)

    def others_profile_again(self) -> None:
        """Blocks on this device do something else than in the step that was profiled: others' memory may show it."""
        for part in self.lead.parts:
            part._again = part is not self

    def profiles_again(self) -> bool:
        """Whether this step is to be profiled for that reason; once."""
        again, self._again = self._again, False
        if again:
            self._slack.forget()
        return again

    def failed(self, error: BaseException | None) -> None:
        """An exception leaves the region in which the model is fitted: if memory ran out, say where."""
        for part in self.parts:
            part.exhaustion.passing(error)


def blocks_by_device(model: torch.nn.Module, wanted: list[str] | None) -> dict[torch.device, list[str]]:
    """The names of a model's blocks, by the device that they are on, in the order of their first blocks.

    A block whose parameters are on several devices is split into its children.

    Raises:
        ModelError: As `find_blocks`.
    """
    places: dict[torch.device, list[str]] = {}
    found = find_blocks(model, wanted)
    while found:
        name, module = found.pop(0)
        devices = {parameter.device for parameter in module.parameters()}
        if len(devices) == 1:
            places.setdefault(devices.pop(), []).append(name)
        else:
            found = [(f"{name}.{child}", part) for child, part in replayable_children(module)] + found
    if not places:
        raise ModelError(
            f"No block of {type(model).__name__} has all its parameters on one device, nor has a part of one. Move "
            "each block to a device, or name others with `blocks=[...]`."
        )
    return places


def elsewhere(model: torch.nn.Module, places: Mapping[torch.device, Sequence[str]]) -> list[str]:
    """One sentence for each device that has parameters and no block."""
    others: dict[torch.device, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.device not in places:
            others.setdefault(parameter.device, []).append(name)
    return [
        f"no block is on `{device}` (`{names[0]}`{' and others' if len(names) > 1 else ''}): nothing is planned there"
        for device, names in others.items()
    ]


def device_of_head(model: torch.nn.Module, devices: Sequence[torch.device]) -> torch.device:
    """Where the loss of a language model is computed, of these devices."""
    device: torch.device | None = getattr(getattr(head_of(model), "weight", None), "device", None)
    return device if device is not None and device in devices else devices[-1]


def merged_plan(plans: Sequence[Plan]) -> Plan:
    """The plans of all devices as one: block calls and sums. Each of the devices finds its own calls in it."""
    policies: list[Policy] = []
    calls = []
    for plan in plans:
        calls += [replace(call, policy=call.policy + len(policies)) for call in plan.calls]
        policies += plan.policies
    budgets = [plan.budget_bytes for plan in plans]
    return replace(
        plans[0],
        device=", ".join(plan.device for plan in plans),
        budget_bytes=None if None in budgets else sum(filter(None, budgets)),
        predicted_peak_bytes=sum(plan.predicted_peak_bytes for plan in plans),
        plain_peak_bytes=sum(plan.plain_peak_bytes for plan in plans),
        recompute_seconds=sum(plan.recompute_seconds for plan in plans),
        saved_bytes=sum(plan.saved_bytes for plan in plans),
        recomputed_bytes=sum(plan.recomputed_bytes for plan in plans),
        peak_event=", ".join(f"{plan.peak_event} on {plan.device}" for plan in plans),
        policies=tuple(policies),
        calls=tuple(calls),
    )


def merged_summary(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summaries of all devices as one, with what is each device's own under ``devices``."""
    first = summaries[0]
    budgets = [summary["budget_bytes"] for summary in summaries]
    words = {summary["budget"] for summary in summaries}
    events = [(summary["peak_event"], summary["device"]) for summary in summaries if summary["peak_event"]]
    return {
        **first,
        **{key: _total([summary[key] for summary in summaries]) for key in _SUMS},
        **dict.fromkeys(_OF_ONE),
        "budget_bytes": None if None in budgets else sum(budgets),
        "device": ", ".join(summary["device"] for summary in summaries),
        "budget": words.pop() if len(words) == 1 else None,
        "peak_event": ", ".join(f"{event} on {device}" for event, device in events) or None,
        "steps": max(summary["steps"] for summary in summaries),
        "notes": list(dict.fromkeys(note for summary in summaries for note in summary["notes"])),
        "blocks": [row for summary in summaries for row in summary["blocks"]],
        "devices": [{key: summary[key] for key in (*_OWN, "peak_event")} for summary in summaries],
    }


def _total(values: Sequence[Any]) -> Any:
    """The sum of those that are known: blocks of one device may never be called."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
