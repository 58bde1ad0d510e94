"""Fit a PyTorch training step into a byte budget.

`fit` watches one training step, decides for every tensor that autograd saves whether to save or to recompute it, and
applies that to the unchanged model. `plan` decides without training, `apply` applies a plan.

Names are imported when they are first used, so that `memfit --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from memfit._version import __version__

if TYPE_CHECKING:
    from memfit.autopilot import apply, fit, plan
    from memfit.chunked import linear_cross_entropy
    from memfit.errors import (
        BudgetError,
        InfeasibleBudgetError,
        MemfitError,
        ModelError,
        PlanError,
        RecomputeError,
    )
    from memfit.forecast import simulate
    from memfit.handle import Handle
    from memfit.plans import Plan
    from memfit.predictions import Prediction

__all__ = [
    "BudgetError",
    "Handle",
    "InfeasibleBudgetError",
    "MemfitError",
    "ModelError",
    "Plan",
    "PlanError",
    "Prediction",
    "RecomputeError",
    "__version__",
    "apply",
    "fit",
    "linear_cross_entropy",
    "plan",
    "simulate",
]

# NOTE [Lazy names] Where each public name lives. No submodule may bear the name of a public function: importing it
# would replace the function by the module.
_HOMES = {
    "fit": "memfit.autopilot",
    "plan": "memfit.autopilot",
    "apply": "memfit.autopilot",
    "simulate": "memfit.forecast",
    "Prediction": "memfit.predictions",
    "linear_cross_entropy": "memfit.chunked",
    "Handle": "memfit.handle",
    "Plan": "memfit.plans",
    "MemfitError": "memfit.errors",
    "BudgetError": "memfit.errors",
    "InfeasibleBudgetError": "memfit.errors",
    "PlanError": "memfit.errors",
    "ModelError": "memfit.errors",
    "RecomputeError": "memfit.errors",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
