"""Tiers, steps and price changes over HTTP: a request is charged its pinned price, tier and place, once; and the day
after, the books agree."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import select

from tenancy import tables
from tenancy.invoicing.invoices import SETTLE_NS
from tenancy.invoicing.periods import DAY_NS, SECOND_NS, period_start_ns
from tenancy.pricing import price_tables
from tenancy.pricing.price_book import PriceTerms, add_draft, get_price, schedule
from tenancy.pricing.prices import Step, charge_nano_usd
from tenancy.usage.meter import Usage, UsageRecord, get_usage
from tests.fakes.hall import Hall
from tests.gateway.conftest import Stage
from tests.gateway.test_key_rules import house

STEPPED: dict[str, Any] = {"batch_percent": 50, "priority_percent": 200, "steps": (Step(60, 1_000, 500, 3_000),)}


async def price(hall: Hall, *, after_ns: int = 0, **more: Any) -> str:
    async with hall.database.transaction() as conn:
        now_ns = hall.services.world.now_ns()
        terms = PriceTerms(hall.services.tokenizer.model_id, 100_000, 50_000, 400_000, 11, **more)
        made = await schedule(
            conn, terms, effective_from_ns=now_ns + after_ns, entropy=hall.services.world.entropy, now_ns=now_ns
        )
        return made.price_id


async def records(hall: Hall) -> list[UsageRecord]:
    await hall.check_books()
    async with hall.database.read() as conn:
        table = tables.usage_record
        ids = await conn.scalars(select(table.c.request_id).order_by(table.c.finished_ns))
        found = [await get_usage(conn, request_id) for request_id in ids.all()]
        for one in found:
            assert one is not None
            charge = charge_nano_usd(await get_price(conn, one.price_id), one.usage, one.tier, one.num_tokens_before)
            assert one.amount_nano_usd == (charge if one.usage != Usage(0, 0, 0) else 0)
        hold = tables.hold
        tiers = {row.request_id: row.tier for row in await conn.execute(select(hold.c.request_id, hold.c.tier))}
        assert tiers == {one.request_id: one.tier for one in found if one is not None}  # what a recovery would charge
        return [one for one in found if one is not None]


def test_each_token_is_charged_on_its_step_once(stage: Stage, runner: asyncio.Runner) -> None:
    hall, _ = stage.make()

    async def scenario() -> None:
        price_id = await price(hall, **STEPPED)
        await price(hall, after_ns=40 * DAY_NS)  # scheduled: nobody's yet
        async with hall.database.transaction() as conn:
            terms = PriceTerms(hall.services.tokenizer.model_id, 1, 1, 1)
            await add_draft(conn, terms, entropy=hall.services.world.entropy, now_ns=0)
        for tier in ("default", "batch", "flex"):
            assert (await hall.chat("tokens " * 3, max_tokens=6, service_tier=tier)).status == 200
        hall.database.faults = ["none", "after"]  # the reply to T2's commit is lost: it is tried again
        assert (await hall.chat("tokens " * 3, max_tokens=6)).status == 200
        answers = await asyncio.gather(*(hall.chat("at once", max_tokens=4, stream=True) for _ in range(6)))
        assert {one.status for one in answers} == {200}
        rows = await records(hall)
        assert {one.price_id for one in rows} == {price_id}
        assert [one.tier for one in rows[:4]] == ["default", "batch", "flex", "default"]
        at = 0
        for one in sorted(
            rows, key=lambda row: row.num_tokens_before
        ):  # together they are [0, all): no gap, no overlap
            assert one.num_tokens_before == at
            at += one.usage.num_prompt_tokens + one.usage.num_completion_tokens
        async with hall.database.read() as conn:
            assert (await conn.execute(select(price_tables.volume.c.num_tokens))).scalar_one() == at

    runner.run(scenario())


def test_a_price_change_in_the_middle_of_a_request_is_not_its_own(stage: Stage, runner: asyncio.Runner) -> None:
    hall, _ = stage.make()

    async def scenario() -> None:
        old = await price(hall)
        begun = asyncio.Event()
        stream = asyncio.create_task(hall.chat(max_tokens=200, stream=True, on_sent=lambda _: begun.set()))
        await begun.wait()
        new = await price(hall, batch_percent=7)
        assert (await stream).status == 200
        assert (await hall.chat(max_tokens=2)).status == 200
        first, second = await records(hall)
        assert (first.price_id, second.price_id) == (old, new)

    runner.run(scenario())


def test_a_day_is_compared_once_when_it_is_settled(stage: Stage, runner: asyncio.Runner, tmp_path: Path) -> None:
    """Seen from the day after: not before it is settled, and not again."""
    hall, _ = stage.make()

    async def scenario() -> None:
        for _ in range(2):
            assert (await hall.chat(max_tokens=3)).status == 200
        today_ns = period_start_ns("day", hall.services.world.now_ns())
        keeper = house(hall, tmp_path)
        real = hall.services.world
        own = hall.services.settings
        settled_ns = (own.hold_ttl_s + own.gateway_return_s) * SECOND_NS + SETTLE_NS
        for early_ns, num_logged in ((1, 0), (0, 1), (0, 1)):
            at_ns = today_ns + DAY_NS + settled_ns - early_ns
            keeper._services = replace(hall.services, world=replace(real, now_ns=lambda: at_ns))  # noqa: B023 - at once
            await keeper.reconcile()
            assert len(await hall.outbox("books.reconciled")) == num_logged
        (entry,) = await hall.outbox("books.reconciled")
        assert (entry["num_requests"], entry["num_differences"], entry["since_ns"]) == (2, 0, str(today_ns))

    runner.run(scenario())
