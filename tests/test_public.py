"""What users may rely on: names and verbs, pinned."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import memfit
from memfit.cli import VERBS

NAMES = [
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


def test_names_are_pinned():
    assert memfit.__all__ == NAMES
    assert len(NAMES) <= 15


def test_verbs_are_pinned():
    assert list(VERBS) == ["run", "plan", "frontier", "max", "bench", "doctor"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name):
    assert getattr(memfit, name) is not None
    assert name in dir(memfit)


def test_unknown_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        memfit.frobnicate  # noqa: B018


def test_functions_stay_functions_whatever_is_imported():
    """A submodule called `plan` would replace the function when it is imported."""
    package = Path(memfit.__file__).parent
    for name in ("fit", "plan", "apply", "simulate"):
        assert not (package / f"{name}.py").exists()
        assert not (package / name).exists()
        getattr(memfit, name)
    import_module("memfit.cli.plan")
    assert callable(memfit.plan)


def test_errors_are_memfit_errors():
    errors = [getattr(memfit, name) for name in NAMES if name.endswith("Error")]
    assert all(issubclass(error, memfit.MemfitError) for error in errors)


@pytest.mark.parametrize("statement", ["import memfit", "import memfit.cli", "from memfit import Plan, BudgetError"])
def test_torch_is_not_imported_before_it_is_needed(statement):
    code = f"import sys; {statement}; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'highspy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_package_says_that_it_is_typed():
    assert (Path(memfit.__file__).parent / "py.typed").exists()
