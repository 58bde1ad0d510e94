"""One stack: the ways in which it can be switched, and what is known to be wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["nothing", "full", "every_n", "attention", "offload"]
"""Save everything; recompute every block, every n-th, all but attention; move the inputs of blocks to the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What decides whether a remark concerns a step.

    Attributes:
        task: One of `memfit.predictions.TASKS`, or ``None`` where nobody knows.
        num_devices: That train together.
        lora: Whether adapters are trained.
        draws: Whether blocks draw random numbers, as dropout does.
    """

    task: str | None
    num_devices: int
    lora: bool
    draws: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """A line to paste or a warning, and when it holds.

    Attributes:
        text: The line, or a sentence.
        tasks: It holds for these; for all, if there are none.
        lora, draws, several: It holds where that is so of the step (``several`` devices).
    """

    text: str
    tasks: tuple[str, ...] = ()
    lora: bool = False
    draws: bool = False
    several: bool = False

    def holds(self, situation: Situation) -> bool:
        """Whether it concerns a step."""
        return (
            (not self.tasks or situation.task in self.tasks)
            and (situation.lora or not self.lora)
            and (situation.draws or not self.draws)
            and (situation.num_devices > 1 or not self.several)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way in which a stack can be switched.

    Attributes:
        kind: What it does.
        lines: To paste; ``{n}`` stands for the number of layers.
        tasks: It is there for these; for all, if there are none.
        in_flight: Of ``offload``: inputs that are on the device at once.
        overlaps: Of ``offload``: whether copies run beside computation.
        drops_random_state: Whether dropout differs when a block runs again, so that gradients are wrong.
        warnings: Of this setting.
    """

    kind: Kind
    lines: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    in_flight: int = 2
    overlaps: bool = True
    drops_random_state: bool = False
    warnings: tuple[Remark, ...] = ()

    def paste(self, number: int = 1) -> tuple[str, ...]:
        """The lines for every ``number``-th layer."""
        return tuple(line.replace("{n}", str(number)) for line in self.lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A training stack.

    Attributes:
        name: As ``--for`` takes it.
        versions: That the entry was read in.
        place: Where the lines go.
        settings: All that it has.
        beside: Lines that belong to every setting.
        warnings: Of all of them.
    """

    name: str
    versions: str
    place: str
    settings: tuple[Setting, ...]
    beside: tuple[Remark, ...] = ()
    warnings: tuple[Remark, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What Memfit's plan for the same budget gains over a stack's best setting.

    Attributes:
        step_ratio: The stack's step time over Memfit's: above 1, Memfit is faster.
        peak_bytes: The stack's expected peak less Memfit's.
    """

    step_ratio: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSetting:
    """The best setting that a stack has by itself for a budget.

    Attributes:
        name: Of the stack.
        versions: That its entry was read in.
        place: Where the lines go.
        setting: What it does, in words.
        lines: To paste.
        fits: Whether its highest peak is within the budget; where none of its settings does, this has the smallest.
        peak_bytes: Expected.
        step_seconds: Of a step with it.
        gain: Memfit's.
        warnings: What is known to be wrong, as sentences.
    """

    name: str
    versions: str
    place: str
    setting: str
    lines: tuple[str, ...]
    fits: bool
    peak_bytes: int
    step_seconds: float
    gain: Gain
    warnings: tuple[str, ...]
