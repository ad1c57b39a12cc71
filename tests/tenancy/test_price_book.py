"""The price book: one price at any time, tiers and steps to the token, drafts that charge nobody, pins that hold."""

import asyncio
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenancy.pricing.price_book import (
    WITHDRAW_NS,
    PriceTerms,
    add_draft,
    discard_draft,
    get_price,
    list_book,
    list_drafts,
    list_prices,
    price_at,
    schedule,
    schedule_draft,
    withdraw,
)
from tenancy.pricing.prices import (
    TIERS,
    Price,
    PriceConflictError,
    PriceError,
    PriceMissingError,
    Step,
    affordable_tokens,
    charge_nano_usd,
    parts_of,
    worst_case_nano_usd,
)
from tenancy.pricing.volume import take_volume, volume_of
from tenancy.usage.meter import Usage
from tests.tenancy.conftest import create_tables, opened
from tests.tenancy.world import SECOND, T0, counting_entropy, populate

figure = st.integers(0, 5_000)
percent = st.integers(0, 300)


@st.composite
def stepped_prices(draw: st.DrawFn, tier: str = "default") -> Price:
    starts = sorted(draw(st.sets(st.integers(1, 120), max_size=3)))
    steps = tuple(Step(start, draw(figure), draw(figure), draw(figure)) for start in starts)
    percents = [draw(percent) for _ in range(3)] if tier == "default" else [100, 100, 100]
    return Price(
        "price_1",
        "m",
        draw(figure),
        draw(figure),
        draw(figure),
        draw(st.integers(0, 9)),
        T0,
        tier,
        "USD",
        *percents,
        steps,
    )


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    prompt = draw(st.integers(0, 60))
    return Usage(prompt, draw(st.integers(0, prompt)), draw(st.integers(0, 60)))


@given(price=stepped_prices(), usage=usages(), before=st.integers(0, 150), tier=st.sampled_from(TIERS))
@settings(max_examples=200)
def test_a_charge_is_the_sum_over_single_tokens(price: Price, usage: Usage, before: int, tier: str) -> None:
    """Token by token, by a search of its step that knows nothing of intervals: rounded once, at the end."""
    kinds = ["cached_input"] * usage.num_cached_tokens
    kinds += ["input"] * (usage.num_prompt_tokens - usage.num_cached_tokens)
    kinds += ["output"] * usage.num_completion_tokens
    pico = 0
    for offset, kind in enumerate(kinds):
        on = max((step for step in price.all_steps if step.from_tokens <= before + offset), key=lambda s: s.from_tokens)
        pico += getattr(on, f"{kind}_pico_usd")
    percents = {
        "default": 100,
        "flex": price.flex_percent,
        "batch": price.batch_percent,
        "priority": price.priority_percent,
    }
    exact = (Fraction(pico, 1_000) + price.request_nano_usd) * percents[tier] / 100
    assert charge_nano_usd(price, usage, tier, before) == round(exact)
    assert sum(part.num_tokens for part in parts_of(price, usage, before)) == len(kinds)


@given(
    price=stepped_prices(),
    usage=usages(),
    before=st.integers(0, 150),
    more=st.one_of(st.just(0), st.integers(0, 80)),
    data=st.data(),
)
@settings(max_examples=200)
def test_what_was_held_covers_whatever_was_settled_between(
    price: Price, usage: Usage, before: int, more: int, data: st.DataObject
) -> None:
    tier = data.draw(st.sampled_from(TIERS))
    starts = [step.from_tokens for step in price.steps]
    before = data.draw(st.sampled_from([before, *starts, *(start - 1 for start in starts)]))
    slack = data.draw(st.integers(0, 5))
    prompt, top = usage.num_prompt_tokens + slack, usage.num_completion_tokens + slack
    held = worst_case_nano_usd(price, prompt, top, tier, before)
    assert 0 <= charge_nano_usd(price, usage, tier, before + more) <= held
    fits = affordable_tokens(price, prompt, top, held, tier, before)
    assert worst_case_nano_usd(price, prompt, fits, tier, before) <= held
    assert fits == top


def test_a_boundary_inside_one_request_by_hand() -> None:
    price = Price("p", "m", 1_000, 500, 4_000, 0, T0, batch_percent=50, steps=(Step(100, 800, 400, 2_000),))
    usage = Usage(30, 10, 10)  # 10 cached, 20 other prompt tokens, 10 of the answer
    # from token 95: 5 cached at 500, 5 at 400; 20 at 800; 10 at 2000
    assert charge_nano_usd(price, usage, num_tokens_before=95) == round(
        Fraction(2_500 + 2_000 + 16_000 + 20_000, 1_000)
    )
    assert charge_nano_usd(price, usage, "batch", 95) == 20  # 20.25, half
    # from token 80: 10 at 500, 10 at 1000 | 10 at 800, 10 at 2000
    assert charge_nano_usd(price, usage, num_tokens_before=80) == 43


terms = st.builds(
    PriceTerms,
    st.just("m"),
    figure,
    figure,
    figure,
    tier=st.sampled_from(TIERS),
    currency=st.sampled_from(["USD", "EUR"]),
    steps=st.sampled_from([(), (Step(7, 1, 1, 1),)]),
)


@given(asked=st.lists(st.tuples(terms, st.integers(0, 12)), max_size=8), drafts=st.lists(terms, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_at_any_time_one_price_or_none(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[PriceTerms, int]], drafts: list[PriceTerms]
) -> None:
    """Against the rule said in one line, over what was accepted; drafts change nothing."""
    url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('book') / 'bulkhead.db'}"

    async def run() -> None:
        await create_tables(url)
        entropy = counting_entropy()
        async with opened(url) as database, database.transaction() as conn:
            accepted: list[Price] = []
            for one, start in asked:
                try:
                    accepted.append(await schedule(conn, one, effective_from_ns=start, entropy=entropy, now_ns=0))
                except PriceConflictError:
                    assert any(
                        (p.tier, p.currency, p.effective_from_ns) == (one.tier, one.currency, start) for p in accepted
                    )
            for one in drafts:
                await add_draft(conn, one, entropy=entropy, now_ns=0)
            assert len(await list_drafts(conn)) == len(drafts)
            for at in range(-1, 14):
                for tier in TIERS:
                    begun = [p for p in accepted if p.effective_from_ns <= at and p.currency == "USD"]
                    mine = [p for p in begun if p.tier == tier] or [p for p in begun if p.tier == "default"]
                    if mine:
                        right = max(mine, key=lambda p: p.effective_from_ns)
                        assert await price_at(conn, "m", at, tier) == right
                    else:
                        with pytest.raises(PriceMissingError):
                            await price_at(conn, "m", at, tier)
                # The book's own intervals: each line is covered from its first date on, by one row at a time.
                for line in {(p.tier, p.currency) for p in accepted}:
                    rows = [e for e in await list_book(conn, at) if (e.price.tier, e.price.currency) == line]
                    inside = [
                        e for e in rows if e.price.effective_from_ns <= at and (e.until_ns is None or at < e.until_ns)
                    ]
                    begun = [e for e in rows if e.price.effective_from_ns <= at]
                    assert len(inside) == bool(begun)
                    assert [e.state for e in inside] == ["active"] * len(inside)

    asyncio.run(run())


def test_a_price_in_another_currency_is_not_for_the_account(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            acme = await populate(conn, entropy=entropy)
            euro = PriceTerms("m", 1, 1, 1, currency="EUR")
            only_euro = PriceTerms("n", 1, 1, 1, currency="EUR")
            for one in (euro, only_euro):
                await schedule(conn, one, effective_from_ns=T0 + 5, entropy=entropy, now_ns=T0)
            assert (await price_at(conn, "m", T0 + 9, tenant_id=acme.tenant_id)).currency == "USD"
            with pytest.raises(PriceMissingError):
                await price_at(conn, "n", T0 + 9, tenant_id=acme.tenant_id)

    asyncio.run(run())


def test_the_life_of_a_draft(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            steps = (Step(1_000, 3, 2, 1),)
            first = await add_draft(conn, PriceTerms("m", 9, 8, 7, 6, steps=steps), entropy=entropy, now_ns=T0)
            other = await add_draft(conn, PriceTerms("m", 1, 1, 1, tier="batch"), entropy=entropy, now_ns=T0 + 1)
            assert await list_drafts(conn) == [first, other]
            assert await list_prices(conn) == []
            with pytest.raises(PriceMissingError):
                await price_at(conn, "m", T0 + 99)
            price = await schedule_draft(
                conn, first.draft_id, effective_from_ns=T0 + 50, entropy=entropy, now_ns=T0 + 2
            )
            assert price.steps == steps
            assert await get_price(conn, price.price_id) == price
            assert [(e.price, e.state) for e in await list_book(conn, T0 + 49)] == [(price, "scheduled")]
            assert [e.state for e in await list_book(conn, T0 + 50)] == ["active"]
            await discard_draft(conn, other.draft_id, now_ns=T0 + 3)
            for gone in (first, other):
                with pytest.raises(PriceError, match=gone.draft_id):
                    await schedule_draft(conn, gone.draft_id, effective_from_ns=T0 + 60, entropy=entropy, now_ns=T0 + 4)
                with pytest.raises(PriceError, match=gone.draft_id):
                    await discard_draft(conn, gone.draft_id, now_ns=T0 + 4)
            assert await list_drafts(conn) == []
            assert await list_prices(conn) == [price]
            late = PriceTerms("m", 1, 1, 1, tier="batch")
            with pytest.raises(PriceConflictError, match="in the past"):  # a tier's own first price, too
                await schedule(conn, late, effective_from_ns=T0 + 4, entropy=entropy, now_ns=T0 + 5)

    asyncio.run(run())


def test_a_book_without_prices_in_it(database_url: str) -> None:
    """Nothing at all, and a model whose only price was withdrawn."""

    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            assert await list_book(conn, T0) == []
            terms, begins = PriceTerms("m", 1, 1, 1), T0 + 2 * WITHDRAW_NS
            price = await schedule(conn, terms, effective_from_ns=begins, entropy=counting_entropy(), now_ns=T0)
            await withdraw(conn, price.price_id, now_ns=T0)
            assert [(one.price, one.state) for one in await list_book(conn, T0, "m")] == [(price, "withdrawn")]

    asyncio.run(run())


def test_a_scheduled_price_is_withdrawn_before_it_is_in_force(database_url: str) -> None:
    """What was in force goes on without a gap; another may begin at the same instant."""

    async def run() -> None:
        entropy = counting_entropy()
        begins = T0 + 2 * WITHDRAW_NS
        async with opened(database_url) as database, database.transaction() as conn:

            async def put(cost: int, at_ns: int, **more: Any) -> Price:
                terms = PriceTerms("m", cost, cost, cost, **more)
                return await schedule(conn, terms, effective_from_ns=at_ns, entropy=entropy, now_ns=T0)

            old = await put(1, T0)
            steps = (Step(1_000, 3, 2, 1),)
            wrong, later, euro = (
                await put(2, begins, steps=steps),
                await put(4, begins + 9),
                await put(5, begins, currency="EUR"),
            )
            with pytest.raises(PriceConflictError, match="another price"):
                await put(3, begins)
            for price, now_ns in ((old, T0), (wrong, begins - WITHDRAW_NS + 1), (wrong, begins), (wrong, begins + 20)):
                with pytest.raises(PriceConflictError, match="withdrawn until"):
                    await withdraw(conn, price.price_id, now_ns=now_ns)
            with pytest.raises(PriceMissingError):
                await withdraw(conn, "price_none", now_ns=T0)
            assert await withdraw(conn, wrong.price_id, now_ns=begins - WITHDRAW_NS) == (wrong, True)
            assert await withdraw(conn, wrong.price_id, now_ns=begins + 20) == (wrong, False)
            in_force = [(await price_at(conn, "m", begins + at)).price_id for at in (-1, 0, 8, 9)]
            assert in_force == [old.price_id] * 3 + [later.price_id]
            book = [(e.price.price_id, e.state, e.until_ns) for e in await list_book(conn, begins)]
            assert (old.price_id, "active", begins + 9) in book
            assert book[-1] == (wrong.price_id, "withdrawn", begins)

            right = await put(3, begins)
            assert (await price_at(conn, "m", begins)).price_id == right.price_id
            assert (await price_at(conn, "m", begins - 1)).price_id == old.price_id
            assert [e.until_ns for e in await list_book(conn, begins) if e.price == old] == [begins]
            assert await put(3, begins) == right
            await withdraw(conn, right.price_id, now_ns=T0)
            again = await put(2, begins, steps=steps)  # the terms of the first, which is not it
            assert again.price_id != wrong.price_id
            assert await list_prices(conn) == sorted(
                [old, again, later, euro], key=lambda one: (one.currency, one.effective_from_ns)
            )

    asyncio.run(run())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tier": "gold"}, "a tier is one of"),
        ({"currency": "usd"}, "ISO 4217"),
        ({"tier": "batch", "batch_percent": 50}, "only the default"),
        ({"batch_percent": 1_001}, "0 to 1000"),
        ({"steps": (Step(5, 1, 1, 1), Step(5, 1, 1, 1))}, "later than the one before"),
        ({"steps": (Step(0, 1, 1, 1),)}, "above 0"),
    ],
)
def test_figures_that_contradict_each_other(more: dict[str, object], message: str) -> None:
    with pytest.raises(PriceError, match=message):
        PriceTerms("m", 1, 1, 1, **more)  # type: ignore[arg-type]


def test_volume_counts_each_token_once_however_many_settle_at_once(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        price = Price("p", "m", 1, 1, 1, 0, T0, steps=(Step(10, 1, 1, 1),))
        async with opened(database_url) as database:
            async with database.transaction() as conn:
                acme = await populate(conn, entropy=entropy)

            async def settle(num: int) -> tuple[int, int]:
                async with database.transaction() as conn:
                    before = await take_volume(conn, acme.tenant_id, price, T0, num)
                    await asyncio.sleep(0)
                    return before, before + num

            taken = sorted(await asyncio.gather(*(settle(num) for num in (3, 1, 4, 1, 5, 9, 2, 6))))
            assert [begin for begin, _ in taken] == [0, *(end for _, end in taken[:-1])]  # no gap, no overlap
            async with database.read() as conn:
                assert await volume_of(conn, acme.tenant_id, price, T0) == 31
                assert await volume_of(conn, acme.tenant_id, price, T0 + 40 * 86_400 * SECOND) == 0
                plain = Price("p", "m", 1, 1, 1, 0, T0)
                assert await volume_of(conn, acme.tenant_id, plain, T0) == 0

    asyncio.run(run())
