"""Prices: the hold always covers the charge, intervals are half-open, and no row ever changes what was in force."""

import asyncio
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenancy.pricing.price_book import add_price, get_price, list_prices, price_at
from tenancy.pricing.prices import (
    PRICE_MAX,
    Price,
    PriceConflictError,
    PriceMissingError,
    charge_nano_usd,
    worst_case_nano_usd,
)
from tenancy.usage.meter import Usage
from tests.tenancy.conftest import create_tables, opened
from tests.tenancy.world import T0, counting_entropy

per_token = st.integers(0, PRICE_MAX)
prices = st.builds(Price, st.just("price_1"), st.just("m"), per_token, per_token, per_token, per_token, st.just(T0))


@st.composite
def bounded_usage(draw: st.DrawFn) -> tuple[Usage, int, int]:
    """A usage, and bounds that it stays within."""
    num_prompt_tokens, max_tokens = draw(st.integers(0, 200_000)), draw(st.integers(0, 200_000))
    prompt = draw(st.integers(0, num_prompt_tokens))
    usage = Usage(prompt, draw(st.integers(0, prompt)), draw(st.integers(0, max_tokens)))
    return usage, num_prompt_tokens, max_tokens


@given(price=prices, bounded=bounded_usage())
def test_the_worst_case_covers_every_charge_within_it(price: Price, bounded: tuple[Usage, int, int]) -> None:
    usage, num_prompt_tokens, max_tokens = bounded
    assert 0 <= charge_nano_usd(price, usage) <= worst_case_nano_usd(price, num_prompt_tokens, max_tokens)


@given(price=prices, bounded=bounded_usage())
def test_a_charge_is_the_exact_sum_rounded_once(price: Price, bounded: tuple[Usage, int, int]) -> None:
    usage = bounded[0]
    exact = (
        Fraction(usage.num_prompt_tokens - usage.num_cached_tokens) * price.input_pico_usd
        + Fraction(usage.num_cached_tokens) * price.cached_input_pico_usd
        + Fraction(usage.num_completion_tokens) * price.output_pico_usd
    ) / 1_000 + price.request_nano_usd
    assert charge_nano_usd(price, usage) == round(exact)


def test_a_charge_by_hand() -> None:
    price = Price("price_1", "m", 150_000, 15_000, 600_000, 7, T0)
    # 700 * 150 + 300 * 15 + 11 * 600 = 116,100 nano-USD, and 7 for the request
    assert charge_nano_usd(price, Usage(1_000, 300, 11)) == 116_107
    assert worst_case_nano_usd(price, 1_000, 11) == 156_607


moments = st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True)


@given(starts=moments)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_intervals_are_half_open(tmp_path_factory: pytest.TempPathFactory, starts: list[int]) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('prices') / 'bulkhead.db'}"

    async def run() -> None:
        await create_tables(url)
        async with opened(url) as database, database.transaction() as conn:
            for start in starts:
                await _add(conn, effective_from_ns=start, input_pico_usd=start, now_ns=0)
            for at in range(-1, 22):
                begun = [start for start in starts if start <= at]
                if begun:
                    assert (await price_at(conn, "m", at)).input_pico_usd == max(begun)
                else:
                    with pytest.raises(PriceMissingError, match="'m'"):
                        await price_at(conn, "m", at)

    asyncio.run(run())


async def _add(conn: Any, *, effective_from_ns: int, input_pico_usd: int = 5, now_ns: int, model: str = "m") -> Price:
    return await add_price(
        conn,
        model=model,
        input_pico_usd=input_pico_usd,
        cached_input_pico_usd=1,
        output_pico_usd=9,
        effective_from_ns=effective_from_ns,
        entropy=counting_entropy(f"{model}{effective_from_ns}{input_pico_usd}"),
        now_ns=now_ns,
    )


def test_a_price_in_force_never_changes(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            first = await _add(conn, effective_from_ns=T0 - 100, now_ns=T0)  # the first may begin in the past
            assert await _add(conn, effective_from_ns=T0 - 100, now_ns=T0 + 50) == first  # again: the same row
            with pytest.raises(PriceConflictError, match=first.price_id):
                await _add(conn, effective_from_ns=T0 - 100, input_pico_usd=6, now_ns=T0)
            with pytest.raises(PriceConflictError, match="in the past"):
                await _add(conn, effective_from_ns=T0 - 1, now_ns=T0)
            next_ = await _add(conn, effective_from_ns=T0, input_pico_usd=6, now_ns=T0)
            other = await _add(conn, effective_from_ns=T0, now_ns=T0, model="n")
            assert await list_prices(conn) == [first, next_, other]
            assert await list_prices(conn, "n") == [other]
            assert await price_at(conn, "m", T0 - 1) == first == await get_price(conn, first.price_id)
            with pytest.raises(PriceMissingError, match="price_x"):
                await get_price(conn, "price_x")

    asyncio.run(run())


@pytest.mark.parametrize("bad", [-1, PRICE_MAX + 1, 1.5, True])
def test_prices_are_bounded_integers(bad: Any) -> None:
    for at in range(4):
        figures = [1, 1, 1, 1]
        figures[at] = bad
        with pytest.raises((ValueError, TypeError), match=str(bad)):
            Price("price_1", "m", *figures, T0)
