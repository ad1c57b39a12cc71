"""Usage rows and what the admin page reads of them."""

import asyncio
from dataclasses import replace

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.accounts.ledger import capture, grant_credit, place_hold
from tenancy.quotas.limits import set_limits
from tenancy.usage.meter import (
    Effort,
    TenantUsage,
    Usage,
    UsageConflictError,
    UsageRecord,
    get_usage,
    record_usage,
    usage_by_tenant,
)
from tenancy.usage.overview import TenantOverview, tenant_overview
from tests.tenancy.conftest import opened
from tests.tenancy.world import SECOND, T0, Populated, counting_entropy, populate


def record(made: Populated, request_id: str, finished_ns: int, amount_nano_usd: int = 70) -> UsageRecord:
    return UsageRecord(
        request_id=request_id,
        tenant_id=made.tenant_id,
        project_id=made.project_id,
        key_id=made.key_id,
        model="m",
        usage=Usage(100, 40, 7),
        price_id=made.price_id,
        amount_nano_usd=amount_nano_usd,
        started_ns=T0,
        finished_ns=finished_ns,
        finish_reason="stop",
        stream=True,
    )


def test_a_request_is_recorded_once(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=counting_entropy())
            first = record(made, "req_1", T0 + 5)
            assert await record_usage(conn, first)
            assert not await record_usage(conn, first)
            assert await get_usage(conn, "req_1") == first
            assert await get_usage(conn, "req_2") is None
            measured = replace(first, request_id="req_3", effort=Effort(5, 0, 60, 3, 6))
            assert await record_usage(conn, measured)
            assert await get_usage(conn, "req_3") == measured
            with pytest.raises(UsageConflictError, match="req_3"):
                await record_usage(conn, replace(measured, effort=None))
            for changed in (
                replace(first, amount_nano_usd=71),
                replace(first, usage=Usage(100, 40, 8)),
                replace(first, stream=False),
                replace(first, effort=Effort(0, 0, 0, 0, 0)),  # measured and nothing is not the same as not measured
            ):
                with pytest.raises(UsageConflictError, match="req_1"):
                    await record_usage(conn, changed)

    asyncio.run(run())


def test_sums_are_per_tenant_and_half_open(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            entropy = counting_entropy()
            acme, globex = [await populate(conn, name, entropy=entropy) for name in ("acme", "globex")]
            for number, finished_ns in enumerate((T0, T0 + 10, T0 + 20)):
                await record_usage(conn, record(acme, f"req_{number}", finished_ns))
            await record_usage(conn, record(globex, "req_9", T0 + 10, amount_nano_usd=2**62))
            expected = [
                TenantUsage(acme.tenant_id, 2, 200, 80, 14, 140),
                TenantUsage(globex.tenant_id, 1, 100, 40, 7, 2**62),
            ]
            assert await usage_by_tenant(conn, T0, T0 + 20) == sorted(expected, key=lambda usage: usage.tenant_id)
            assert await usage_by_tenant(conn, T0 + 21, T0 + 99) == []

    asyncio.run(run())


async def _serve_one(conn: AsyncConnection, made: Populated) -> None:
    await grant_credit(conn, made.tenant_id, 1_000, transfer_id="grant", now_ns=T0)
    for hold_id in ("hold_1", "hold_2"):
        await place_hold(
            conn,
            hold_id=hold_id,
            tenant_id=made.tenant_id,
            request_id=hold_id,
            price_id=made.price_id,
            amount_nano_usd=100,
            expires_ns=T0 + SECOND,
            now_ns=T0,
        )
    await capture(conn, "hold_1", 70, T0 + 5)
    await record_usage(conn, record(made, "req_1", T0 + 5))
    await set_limits(conn, "tenant", made.tenant_id, tokens_per_minute=500, now_ns=T0)


def test_the_overview_has_every_tenant_in_three_queries(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            entropy = counting_entropy()
            acme = await populate(conn, "acme", entropy=entropy)
            for number in range(5):
                await populate(conn, f"idle {number}", entropy=entropy)
            await _serve_one(conn, acme)
            queries: list[str] = []
            event.listen(
                database._engine.sync_engine, "before_cursor_execute", lambda _c, _k, sql, *_: queries.append(sql)
            )
            overview = await tenant_overview(conn, T0)
            assert len(queries) == 3
            assert [row.name for row in overview] == ["acme", *(f"idle {number}" for number in range(5))]
            first, idle = overview[0], overview[1]
            assert first == TenantOverview(acme.tenant_id, "acme", "active", 1, 100, 40, 7, 70, 100, 830, first.limits)
            assert (first.limits.tokens_per_minute, first.limits.requests_per_minute) == (500, None)
            assert (idle.num_requests, idle.billed_nano_usd, idle.limits.tokens_per_minute) == (0, 0, None)
            assert (await tenant_overview(conn, T0 + 6))[0].num_requests == 0

    asyncio.run(run())


def test_impossible_usage_is_refused() -> None:
    with pytest.raises(ValueError, match="8 cached tokens of 7"):
        Usage(7, 8, 0)
    with pytest.raises(ValueError, match="-1"):
        Usage(7, 0, -1)
    with pytest.raises(TypeError, match="True"):
        Usage(7, True, 0)
