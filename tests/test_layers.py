"""Imports point down: data, planning, torch layer, surface. Read with `ast`: an import in a function counts too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import memfit

PACKAGE = Path(memfit.__file__).parent
DATA, PLANNING, TORCH, SURFACE = range(4)

# Whatever is not named here is part of the torch layer.
LAYERS = {
    "_version": DATA,
    "errors": DATA,
    "units": DATA,
    "profiles": DATA,
    "plans": DATA,
    "predictions": DATA,
    "parallelism": DATA,
    "files": DATA,
    "formulas": DATA,
    "hardware": DATA,
    "host": DATA,
    "known": DATA,
    "names": DATA,
    "roofline": DATA,
    "stacks": DATA,
    "solver": PLANNING,
    "cells": DATA,
    "autopilot": SURFACE,
    "bench": SURFACE,
    "trial": SURFACE,
    "handle": SURFACE,
    "handover": SURFACE,
    "offline": SURFACE,
    "forecast": SURFACE,
    "cli": SURFACE,
    "integrations": SURFACE,
    "report": SURFACE,
    "__main__": SURFACE,
}
MAX_LINES = 400

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(module: str) -> str:
    """The part of the house that a module belongs to: `memfit.solver.chain` is `solver`."""
    return module.split(".")[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["memfit", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield from ([f"memfit.{alias.name}" for alias in node.names] if node.module == "memfit" else [node.module])


def ids(path: Path) -> str:
    return module_name(path)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_point_down(path):
    own = LAYERS.get(part(module_name(path)), TORCH)
    for name in imports(path):
        if name.split(".")[0] != "memfit" or name == "memfit":
            # `import memfit` reaches the public names, which only the surface may use.
            assert name != "memfit" or own == SURFACE
            continue
        target = part(name)
        if not (PACKAGE / target).exists() and not (PACKAGE / f"{target}.py").exists():
            assert own == SURFACE, f"{name} is no module: only the surface may use public names"
            continue
        assert LAYERS.get(target, TORCH) <= own, f"{module_name(path)} imports {name}, which lies above it"


@pytest.mark.parametrize("path", [p for p in FILES if LAYERS.get(part(module_name(p)), TORCH) < TORCH], ids=ids)
def test_data_and_planning_do_without_torch(path):
    assert not {"torch", "transformers"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_module_owns_one_thing(path):
    """Past 400 lines it probably owns two."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_drawer_for_the_rest():
    assert not {"utils", "helpers", "common", "misc"} & {path.stem for path in FILES}


def test_every_named_layer_is_there():
    """A part that is renamed must not fall into the torch layer unseen."""
    found = {part(module_name(path)) for path in FILES}
    assert set(LAYERS) - found <= {"autopilot"}
