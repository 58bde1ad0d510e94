"""What a training step is predicted to hold and to take, as data. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from memfit.formulas import Comparison
from memfit.plans import Plan
from memfit.stacks import StackSetting

TASKS = ("causal-lm", "embedder", "reranker", "classification", "seq2seq", "image")
"""What a configuration can be trained for."""
PRECISIONS = ("fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed")
"""Of the weights; mixed ones keep them in fp32 and autocast."""
QUANTIZED = ("4bit", "8bit")
"""Base weights under adapters, as bitsandbytes keeps them."""
PARTS = (
    "weights",
    "gradients",
    "optimizer_state",
    "saved_tensors",
    "loss",
    "outside_blocks",
    "workspace",
    "process",
    "allocator_slack",
)
"""Of a peak, in the order of reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Bytes at the moment of the step that needs most.

    Attributes:
        low: What tensors take, every allocation counted; on CPU the process itself beside them.
        expected: With what the allocator usually holds beside them.
        high: With the most that it may hold. A budget below this is no promise.
        event: The moment, such as ``loss``.
        parts: What ``expected`` consists of, by the names in `PARTS`: they add up to it.
    """

    low: int
    expected: int
    high: int
    event: str
    parts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One of today's switches, for comparison.

    Attributes:
        name: What people call it.
        peak_bytes: Expected.
        step_seconds: Of a step with it.
        fits: Whether its highest peak is within the budget, as for the plan.
    """

    name: str
    peak_bytes: int
    step_seconds: float
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One training step on one device.

    Attributes:
        model: Name of its class.
        device: Name of the hardware.
        budget_bytes: What the step should fit into: as asked for, or the device's memory.
        fits: Whether ``peak.high`` is within the budget.
        peak: With the plan.
        step_seconds: One optimizer step with the plan, all micro-batches.
        tokens_per_second: Of all devices; ``None`` where the batch has no tokens.
        compute_factor: FLOPs of a step in forwards: 3 where everything trains and nothing is recomputed, 4 with full
            recomputation, less where parameters are frozen.
        forward_flops, backward_flops, recomputed_flops: Of one micro-batch.
        alternatives: What is switched on today, and what that would cost.
        plan: What to save and what to recompute.
        not_counted: What the numbers leave out, as sentences.
        num_parameters, num_trainable: Of the model.
        formula: DeepSpeed-Chat's, beside the count; ``None`` where it says nothing about the model.
        stack: The best setting that a training stack has by itself, where one was asked for.
    """

    model: str
    device: str
    budget_bytes: int
    fits: bool
    peak: Peak
    step_seconds: float
    tokens_per_second: float | None
    compute_factor: float
    forward_flops: float
    backward_flops: float
    recomputed_flops: float
    alternatives: tuple[Alternative, ...]
    plan: Plan
    not_counted: tuple[str, ...]
    num_parameters: int
    num_trainable: int
    formula: Comparison | None = None
    stack: StackSetting | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `json.dumps` takes it: bytes and seconds."""
        found = asdict(self)
        peak = found.pop("peak")
        found["peak_bytes"] = {key: peak[key] for key in ("low", "expected", "high", "parts", "event")}
        return found
