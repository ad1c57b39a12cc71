"""Credit and a credit line are used to the last token and never beyond, however many ask at once, on both databases."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from tenancy.accounts.credit_line import get_line, set_limit
from tenancy.pricing.prices import Price, affordable_tokens, worst_case_nano_usd
from tests.fakes.byte_model import write_byte_model
from tests.fakes.hall import USD, open_hall, world
from tests.fakes.integer_worker import IntegerModel, IntegerWorker

PICO = st.integers(0, 10**7)


@given(prices=st.tuples(PICO, PICO, PICO, PICO), num=st.integers(0, 500), top=st.integers(0, 300), money=st.data())
def test_what_is_afforded_is_the_most_that_is_covered(
    prices: tuple[int, int, int, int], num: int, top: int, money: st.DataObject
) -> None:
    price = Price("p", "m", *prices, 0)
    ceiling = worst_case_nano_usd(price, num, top) + 2
    available = money.draw(st.integers(0, ceiling))
    fits = [n for n in range(top + 1) if worst_case_nano_usd(price, num, n) <= available]
    assert affordable_tokens(price, num, top, available) == max(fits, default=0)


@pytest.mark.parametrize("line", [0, 140 * USD])
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_many_at_once_spend_all_and_no_more(
    kind: str,
    line: int,
    request: pytest.FixtureRequest,
    runner: asyncio.Runner,
    redis: Redis,
    short_folder: Path,
    tmp_path: Path,
) -> None:
    url = request.getfixturevalue("postgres_server").new_served_database() if kind == "postgresql" else ""
    credit = 200 * USD + USD // 2  # of it `line` is a post-paid tenant's limit

    async def scenario() -> None:
        worker = IntegerWorker(short_folder / f"credit-{kind}-{line}.sock", model=IntegerModel(eos_every=1_000_003))
        await worker.start()
        model = write_byte_model(tmp_path / "model")
        how = {"credit_nano_usd": credit - line, "output_pico_usd": 10**12}  # one USD a token
        async with open_hall(tmp_path, redis, model, worker.path, world=world(), database_url=url, **how) as hall:
            async with hall.database.transaction() as conn:
                tenant_id = hall.accounts["acme"].tenant_id
                await set_limit(conn, tenant_id, line, transfer_id="limit", now_ns=hall.services.world.now_ns())
            answers = []
            for _ in range(6):  # until nothing is left: what one gives back, the next may use
                answers += await asyncio.gather(*(hall.chat(max_tokens=30, stream=n % 2 == 0) for n in range(12)))
                await hall.check_books()
            assert {answer.status for answer in answers} == {200, 429}
            assert answers[-1].headers["x-should-retry"] == "false"
            lowered = [answer for answer in answers if "x-bulkhead-budget" in answer.headers]
            assert lowered
            rows = await hall.usage_rows()
            num_tokens = sum(row.num_completion_tokens for row in rows.values())
            assert num_tokens == 200
            assert num_tokens == sum(worker.counts[row].num_completion_tokens for row in rows)
            money = await hall.credit()
            assert money.captured_nano_usd + money.credit_nano_usd == credit
            assert 0 <= money.credit_nano_usd < USD
            async with hall.database.read() as conn:
                drawn = await get_line(conn, tenant_id)
            assert (0 if drawn is None else drawn.drawn_nano_usd) == max(0, money.captured_nano_usd - credit + line)
        await worker.stop()

    runner.run(scenario())
