"""DeepSpeed-Chat's formula for the FLOPs of a step beside the FLOPs that were counted, and where it is off. No torch.

Source:
    DeepSpeedExamples 83757d9c `applications/DeepSpeed-Chat/dschat/utils/perf.py`, which cites Narayanan et al. 2021,
    "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", arXiv 2104.04473, equation 3:

        F = 24 f B s L h² (1 + s / 6h + V / 16Lh),   f = 4 with checkpointing, else 3;   with LoRA f - 1 + 2r / h

    The paper has it for f = 4 only: there the head's 1.5 f B s h V are its 6 B s h V.
"""

from __future__ import annotations

from dataclasses import dataclass

_TERA = 1e12
_OFF = 0.005
"""Differences below half a percent are not worth a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the formula reads of a step.

    Attributes:
        batch: Rows on one device.
        length: Tokens of a row.
        num_layers, hidden, vocabulary: Of the configuration.
        lora_rank: ``None`` without adapters.
    """

    batch: int
    length: int
    num_layers: int
    hidden: int
    vocabulary: int
    lora_rank: int | None = None

    def factor(self, *, checkpointing: bool) -> float:
        """``f``: the forwards that a step is taken for."""
        factor = 4.0 if checkpointing else 3.0
        return factor if self.lora_rank is None else factor - (1 - 2 * self.lora_rank / self.hidden)

    @property
    def block_flops(self) -> float:
        """Of one forward through all layers."""
        per_token = 24 * self.num_layers * self.hidden**2 * (1 + self.length / (6 * self.hidden))
        return self.batch * self.length * per_token

    @property
    def head_flops(self) -> float:
        """Of the head in one forward."""
        return 1.5 * self.batch * self.length * self.hidden * self.vocabulary

    def flops(self, *, checkpointing: bool) -> float:
        """Of a step of one micro-batch."""
        return self.factor(checkpointing=checkpointing) * (self.block_flops + self.head_flops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """FLOPs of one micro-batch, op by op.

    Attributes:
        forward, backward: Of the model, nothing recomputed.
        recomputed: With full checkpointing.
        head: Forward and backward of what lies outside the blocks: the head and the loss.
        blocks: Forward through all blocks.
    """

    forward: float
    backward: float
    recomputed: float
    head: float
    blocks: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One switch, counted and by the formula.

    Attributes:
        name: Of the switch.
        counted_flops, formula_flops: Of one micro-batch.
        counted_factor, formula_factor: In forwards.
        printed_flops: What DeepSpeed-Chat takes for the FLOPs of a device: divided by the number of devices.
    """

    name: str
    counted_flops: float
    formula_flops: float
    counted_factor: float
    formula_factor: float
    printed_flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """DeepSpeed-Chat's formula and the count.

    Attributes:
        rows: Without and with full checkpointing.
        reasons: Where the formula is off for this step, as sentences with both numbers.
    """

    rows: tuple[Row, ...]
    reasons: tuple[str, ...]


def compare(sizes: Sizes, counted: Counted, *, num_devices: int) -> Comparison:
    """The formula beside the count.

    Args:
        sizes: That the formula reads.
        counted: Of the same micro-batch.
        num_devices: That train, each with its own batch.
    """
    rows = []
    for name, checkpointing in (("nothing", False), ("full checkpointing", True)):
        total = counted.forward + counted.backward + (counted.recomputed if checkpointing else 0.0)
        formula = sizes.flops(checkpointing=checkpointing)
        rows.append(
            Row(
                name=name,
                counted_flops=total,
                formula_flops=formula,
                counted_factor=total / max(counted.forward, 1.0),
                formula_factor=sizes.factor(checkpointing=checkpointing),
                printed_flops=formula / num_devices,
            )
        )
    return Comparison(rows=tuple(rows), reasons=tuple(_reasons(sizes, counted, rows, num_devices)))


def _reasons(sizes: Sizes, counted: Counted, rows: list[Row], num_devices: int) -> list[str]:
    found = []
    if num_devices > 1:
        found.append(
            f"It divides the batch of one device by {num_devices} devices: it prints {_tera(rows[0].printed_flops)} "
            f"TFLOPs of a device's {_tera(rows[0].formula_flops)}."
        )
    if _differ(sizes.block_flops, counted.blocks):
        found.append(
            f"It takes every layer for four square projections and a two-matrix MLP of 4h: "
            f"{_tera(sizes.block_flops)} TFLOPs of a forward through the layers, where there are "
            f"{_tera(counted.blocks)}."
        )
    heads = [sizes.factor(checkpointing=on) * sizes.head_flops for on in (False, True)]
    if any(_differ(head, counted.head) for head in heads):
        found.append(
            f"It scales the head with the factor, as if it were recomputed: {_tera(heads[0])} TFLOPs without "
            f"checkpointing and {_tera(heads[1])} with, where there are {_tera(counted.head)} in either."
        )
    if sizes.lora_rank is not None and any(_differ(row.formula_factor, row.counted_factor) for row in rows):
        found.append(
            f"With LoRA it takes one forward off the step, attention's too, which has no weights: "
            f"{rows[0].formula_factor:.3g} forwards, where there are {rows[0].counted_factor:.3g}; with checkpointing "
            f"{rows[1].formula_factor:.3g}, where there are {rows[1].counted_factor:.3g}."
        )
    if sizes.lora_rank is None and _differ(rows[0].formula_factor, rows[0].counted_factor):
        found.append(
            f"It takes a step for {rows[0].formula_factor:.3g} forwards; fused attention runs its forward again in the "
            f"backward, and frozen weights have no gradients: there are {rows[0].counted_factor:.3g}."
        )
    if sizes.lora_rank is None and _differ(rows[1].formula_factor, rows[1].counted_factor):
        found.append(
            f"With checkpointing it takes a step for {rows[1].formula_factor:.3g} forwards; neither the head nor what "
            f"no gradient needs is computed again: there are {rows[1].counted_factor:.3g}."
        )
    return found


def _differ(formula: float, counted: float) -> bool:
    return abs(formula - counted) > _OFF * max(counted, 1.0)


def _tera(flops: float) -> str:
    return f"{flops / _TERA:.3g}"
