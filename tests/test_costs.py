"""How long an op takes, read where other processes take the cores away."""

from __future__ import annotations

import pytest

from memfit import costs


@pytest.mark.parametrize(
    ("first", "runs", "best", "num_runs"),
    [
        (0.0010, [0.0009, 0.0008], 0.0008, 2),  # they agree: the second repeat brought little more
        (0.0090, [0.0080, 0.0005, 0.0004], 0.0004, 3),  # twice it waited for a core
        (0.0010, [0.0004, 0.0003, 0.0003], 0.0003, 3),  # the first run touched its memory first
        (0.0900, [0.0600], 0.0600, 1),  # long ops are repeated once
        (0.0900, [0.0080, 0.0035, 0.0015, 0.0006], 0.0006, 4),  # never more than four times
    ],
)
def test_an_op_is_timed_until_that_brings_no_more(
    monkeypatch: pytest.MonkeyPatch, first: float, runs: list[float], best: float, num_runs: int
) -> None:
    now = 0.0
    left = list(runs)

    def run() -> None:
        nonlocal now
        now += left.pop(0)

    monkeypatch.setattr(costs.time, "perf_counter", lambda: now)
    assert costs.warm_seconds(first, run) == pytest.approx(best)
    assert len(runs) - len(left) == num_runs
