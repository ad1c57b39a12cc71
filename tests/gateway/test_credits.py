"""Credit that has ended: found by the next request or by the housekeeping, logged once, gone to the last nano-USD."""

import asyncio
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from tenancy import tables
from tenancy.accounts.ledger import grant_credit
from tenancy.accounts.ledger_check import check_ledger
from tests.fakes.hall import Hall
from tests.gateway.conftest import Stage
from tests.gateway.test_key_rules import house


async def ended(hall: Hall, transfer_id: str, tenant: str = "acme") -> None:
    """A promotional credit of 500 that was granted and ended long ago."""
    past: Any = {"now_ns": 1, "expires_ns": 2, "kind": "promotional"}
    async with hall.database.transaction() as conn:
        await grant_credit(conn, hall.accounts[tenant].tenant_id, 500, transfer_id=transfer_id, **past)


def test_ended_credit_goes_with_the_next_request_or_without_one(
    stage: Stage, runner: asyncio.Runner, tmp_path: Path
) -> None:
    hall, _ = stage.make()

    async def scenario() -> None:
        before = (await hall.credit()).credit_nano_usd
        await ended(hall, "by request")
        assert (await hall.chat(max_tokens=1)).status == 200
        await ended(hall, "by housekeeping")
        keeper = house(hall, tmp_path)
        for _ in range(2):
            await keeper.expire_credit()
        logged = await hall.outbox("credit.expired")
        assert [(one["transfer_id"], one["amount_nano_usd"], one["credit_kind"]) for one in logged] == [
            ("by request", "500", "promotional"),
            ("by housekeeping", "500", "promotional"),
        ]
        (row,) = (await hall.usage_rows()).values()
        assert (await hall.credit()).credit_nano_usd == before - row.amount_nano_usd
        await hall.check_books()
        async with hall.database.read() as conn:
            assert (await check_ledger(conn)).ok

    runner.run(scenario())


def test_the_housekeeping_forgets_answers_that_are_over(stage: Stage, runner: asyncio.Runner, tmp_path: Path) -> None:
    hall, _ = stage.make()

    async def scenario() -> None:
        table = tables.idempotency_key
        body = {"model": "integer", "prompt": "x", "max_tokens": 1, "seed": 5}
        assert (await hall.call("POST", "/v1/completions", body, headers={"idempotency-key": "k"})).status == 200
        keeper = house(hall, tmp_path)
        await keeper.forget_answers()
        async with hall.database.transaction() as conn:
            assert await conn.scalar(select(func.count()).select_from(table)) == 1
            await conn.execute(table.update().values(expires_ns=1))
        await keeper.forget_answers()
        async with hall.database.read() as conn:
            assert await conn.scalar(select(func.count()).select_from(table)) == 0

    runner.run(scenario())
