"""Money is exact: rounding against fractions, texts that read back, and no floats anywhere."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenancy.money import (
    BIGINT_MAX,
    MoneyRangeError,
    format_nano_usd,
    pico_to_nano,
    require_amount,
    require_int,
    round_half_even_div,
)

integers = st.integers(-(10**30), 10**30)


@given(numerator=integers, denominator=st.integers(1, 10**6))
def test_division_rounds_half_to_even(numerator: int, denominator: int) -> None:
    assert round_half_even_div(numerator, denominator) == round(Fraction(numerator, denominator))


@given(half=st.integers(-(10**12), 10**12))
def test_ties_go_to_the_even_neighbour(half: int) -> None:
    rounded = pico_to_nano(half * 1_000 + 500)
    assert rounded % 2 == 0
    assert abs(rounded * 1_000 - (half * 1_000 + 500)) == 500


@given(low=integers, high=integers)
def test_rounding_keeps_order(low: int, high: int) -> None:
    low, high = sorted((low, high))
    assert pico_to_nano(low) <= pico_to_nano(high)


@given(nano_usd=integers)
def test_a_formatted_amount_reads_back_exactly(nano_usd: int) -> None:
    text = format_nano_usd(nano_usd)
    assert Fraction(text.replace("$", "").replace(",", "")) * 10**9 == nano_usd


@pytest.mark.parametrize(
    ("nano_usd", "text"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (-42, "-$0.000000042"),
        (1_250_000_000, "$1.25"),
        (1_234_500_000_000, "$1,234.50"),
    ],
)
def test_amounts_as_people_read_them(nano_usd: int, text: str) -> None:
    assert format_nano_usd(nano_usd) == text


@pytest.mark.parametrize("value", [1.0, 0.0, True, False, Decimal(1), Fraction(1), "1", None, float("nan")])
def test_everything_but_an_int_is_refused_and_shown(value: Any) -> None:
    for refuse in (lambda: require_int(value, "amount"), lambda: pico_to_nano(value), lambda: format_nano_usd(value)):
        with pytest.raises(TypeError) as error:
            refuse()
        assert repr(value) in str(error.value)


def test_amounts_have_a_range() -> None:
    assert require_amount(BIGINT_MAX, "amount") == BIGINT_MAX
    for value in (-1, BIGINT_MAX + 1):
        with pytest.raises(MoneyRangeError, match=f"amount must be between 0 and {BIGINT_MAX}: {value}"):
            require_amount(value, "amount")
    with pytest.raises(ValueError, match="at least 1: 0"):
        round_half_even_div(1, 0)
