"""Sizes that a user types are read strictly; sizes that Memfit prints have three digits."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.errors import BudgetError, InfeasibleBudgetError, MemfitError, RecomputeError
from memfit.units import Budget, format_bytes, format_rate, format_seconds, parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GiB", 6 * 2**30),
        ("6 gib", 6 * 2**30),
        ("6.5 GB", 6_500_000_000),
        (" .5 MiB ", 2**19),
        ("1kb", 1000),
        ("1 TiB", 2**40),
        ("6442450944", 6442450944),
        ("17 B", 17),
        ("0.3 GB", 300_000_000),  # not 299999999: no float in between
        (6442450944, 6442450944),
        (6e9, 6_000_000_000),
        (np.int64(5), 5),
        (np.float64(4096.0), 4096),
    ],
)
def test_sizes_are_read(text, expected):
    assert parse_bytes(text) == expected
    assert parse_budget(text) == Budget(kind="bytes", value=expected)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("22 G", "write `22 GiB` (2^30) or `22 GB` (10^9)"),
        ("6", "write `6 GiB`"),
        ("6.5", "write `6.5 GiB`"),
        ("0", "not above zero"),
        ("0 GiB", "not above zero"),
        ("-3GiB", "not above zero"),
        ("0.0000000001 B", "not above zero"),
        (0, "not above zero"),
        (-5, "not above zero"),
        (math.nan, "not a finite number"),
        (math.inf, "not a finite number"),
        (0.9, "a fraction of a byte"),
        (True, "`True` is not a size"),
        ("6 XB", "no unit that Memfit knows"),
        ("1e5GB", "is not a size"),
        ("", "is not a size"),
        ("six", "is not a size"),
        ("٣ GiB", "is not a size"),
        pytest.param("9" * 5000, "more than any machine has", id="long"),
        pytest.param(10**5000, "more than any machine has", id="huge"),
        ([1], "`[1]` is not a size"),
        (np.array([1, 2]), "is not a size"),
        (b"6GiB", "is not a size"),
    ],
)
def test_other_sizes_are_refused_with_the_way_out(value, part):
    for parse in (parse_bytes, parse_budget):
        with pytest.raises(BudgetError) as caught:
            parse(value)
        assert part in str(caught.value)
        assert "`" in str(caught.value)
        assert len(str(caught.value)) < 300
        assert caught.value.value is value


def test_none_is_a_budget_and_not_a_size():
    assert parse_budget(None) == parse_budget("none") == Budget(kind="none")
    with pytest.raises(BudgetError, match="`None` is not a size"):
        parse_bytes(None)


def test_budgets_of_other_kinds_are_read():
    assert parse_budget("90%") == Budget(kind="percent", value=90.0)
    assert parse_budget(" 12.5 % ") == Budget(kind="percent", value=12.5)
    assert parse_budget("AUTO") == Budget(kind="auto")
    assert parse_budget("min") == Budget(kind="min")
    assert parse_budget(Budget(kind="min")) == Budget(kind="min")


@pytest.mark.parametrize("text", ["0%", "101%", "nan%", "-5%", "%", "maximum"])
def test_other_budgets_are_refused(text):
    with pytest.raises(BudgetError, match=f"`{text}`"):
        parse_budget(text)


def test_budgets_print():
    assert [str(parse_budget(value)) for value in ("6GiB", "90%", "min", None)] == ["6.00 GiB", "90%", "min", "none"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1.00 KiB"),
        (1023 * 2**10, "0.999 MiB"),
        (1009 * 2**20, "0.985 GiB"),
        (999.6 * 2**20, "0.976 GiB"),  # not 1000 MiB
        (142 * 2**20, "142 MiB"),
        (99.96 * 2**20, "100 MiB"),
        (9.996 * 2**20, "10.0 MiB"),
        (0.9996 * 2**30, "1.00 GiB"),
        (6.288 * 2**30, "6.29 GiB"),
        (-5 * 2**20, "-5.00 MiB"),
        (2**60, "1048576 TiB"),
    ],
)
def test_bytes_have_three_digits(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (1e-7, "100 ns"),
        (1.5e-4, "150 µs"),
        (0.1424, "142 ms"),
        (0.9996, "1.00 s"),
        (59.99, "60.0 s"),
        (200.4, "3 min 20 s"),
        (119.6, "2 min 0 s"),
        (3599.7, "1 h 0 min"),
        (86400, "24 h 0 min"),
        (-0.0142, "-14.2 ms"),
    ],
)
def test_seconds_have_three_digits(seconds, text):
    assert format_seconds(seconds) == text


@given(st.integers(min_value=1, max_value=2**50))
def test_printed_sizes_are_right_to_three_digits(num_bytes):
    shown = parse_bytes(format_bytes(num_bytes))
    assert abs(shown - num_bytes) <= max(0.006 * num_bytes, 1)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (165.2e12, "165 TFLOP/s"),
        (1.5e15, "1.50 PFLOP/s"),
        (999.6e9, "1.00 TFLOP/s"),
        (12.0, "12.0 FLOP/s"),
        (3e21, "3000000 PFLOP/s"),
    ],
)
def test_rates_have_three_digits_and_a_power_of_ten(rate, text):
    assert format_rate(rate, "FLOP") == text


@given(st.text(max_size=20))
def test_any_text_is_a_budget_or_a_budget_error(text):
    try:
        budget = parse_budget(text)
    except BudgetError:
        return
    assert budget.kind in ("bytes", "percent", "auto", "min", "none")


def test_errors_carry_their_numbers_through_pickle():
    assert issubclass(BudgetError, MemfitError)
    assert issubclass(BudgetError, ValueError)
    infeasible = InfeasibleBudgetError(4 * 2**30, 5 * 2**30, "loss", "Chunk the loss.")
    assert str(infeasible) == "No plan fits 4.00 GiB: the smallest peak is 5.00 GiB, at the loss. Chunk the loss."
    changed = RecomputeError("layers.3", "#7 (bf16[2, 512])", "mm, add")
    for error in (infeasible, changed, BudgetError("Budget `x` is not a size.", "x")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_close_numbers_are_told_apart():
    error = InfeasibleBudgetError(2**30 - 5, 2**30, "loss")
    assert "1073741819 bytes" in str(error)
    assert "1073741824 bytes" in str(error)
