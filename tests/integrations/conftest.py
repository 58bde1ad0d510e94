"""What the tests of every stack share. Each stack has an environment of its own: `make integrations`."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Processes with a folder of their own."""
    return Runs(tmp_path)
