"""Deliveries between servers that look at the same moment, on both databases."""

import asyncio
from typing import Any

from sqlalchemy import update

from tenancy.webhook_tables import webhook_delivery
from tenancy.webhooks import (
    CLAIM_S,
    SECOND,
    Endpoint,
    add_endpoint,
    claim_due,
    deliveries,
    end_endpoint,
    endpoints,
    enqueue,
    record_attempt,
)
from tests.tenancy.conftest import opened
from tests.tenancy.world import T0, counting_entropy

EVENTS = [(number, "key.revoked") for number in range(10)]


def test_each_event_is_queued_and_claimed_once(database_url: str) -> None:
    entropy = counting_entropy()

    async def scenario() -> None:
        async with opened(database_url) as database:
            async with database.transaction() as conn:
                endpoint = await add_endpoint(
                    conn, "https://a/", frozenset({"key.revoked"}), next_leaf_index=0, entropy=entropy, now_ns=T0
                )

            async def queue() -> int:
                async with database.transaction() as conn:
                    return await enqueue(conn, endpoint, EVENTS, next_leaf_index=10, entropy=entropy, now_ns=T0)

            assert sorted(await asyncio.gather(queue(), queue(), queue())) == [0, 0, len(EVENTS)]

            async def claim(now_ns: int = T0) -> list[int]:
                async with database.transaction() as conn:
                    return [delivery.leaf_index for _, delivery in await claim_due(conn, now_ns, 100)]

            claimed = await asyncio.gather(*(claim() for _ in range(4)))
            assert sorted(index for each in claimed for index in each) == list(range(10))
            assert await claim(T0 + (CLAIM_S - 1) * SECOND) == []
            assert len(await claim(T0 + CLAIM_S * SECOND)) == 10

    asyncio.run(scenario())


def test_an_attempt_that_comes_late_changes_nothing(database_url: str) -> None:
    """Two servers sent the same one, because the first took longer than its claim: the second's result stands."""
    entropy = counting_entropy()

    async def scenario() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            endpoint: Endpoint = await add_endpoint(
                conn, "https://a/", frozenset({"x"}), next_leaf_index=0, entropy=entropy, now_ns=T0
            )
            await enqueue(conn, endpoint, [(0, "x")], next_leaf_index=1, entropy=entropy, now_ns=T0)
            ((_, first),) = await claim_due(conn, T0, 1)
            ((_, second),) = await claim_due(conn, T0 + CLAIM_S * SECOND, 1)
            how: dict[str, Any] = {"error": "", "jitter": 0.5, "now_ns": T0 + 1}
            assert (await record_attempt(conn, second, status=200, **how)).state == "delivered"
            late = await record_attempt(conn, first, status=500, **how)
            assert (late.state, late.num_attempts) == ("delivered", 1)

    asyncio.run(scenario())


def test_what_an_ended_endpoint_had_waiting_is_given_up(database_url: str) -> None:
    entropy = counting_entropy()

    async def scenario() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            endpoint = await add_endpoint(
                conn, "https://a/", frozenset({"x"}), next_leaf_index=0, entropy=entropy, now_ns=T0
            )
            await enqueue(conn, endpoint, [(0, "x"), (1, "x")], next_leaf_index=2, entropy=entropy, now_ns=T0)
            await conn.execute(
                update(webhook_delivery).where(webhook_delivery.c.leaf_index == 1).values(state="delivered")
            )
            await end_endpoint(conn, endpoint.endpoint_id, "over", now_ns=T0 + 1)
            assert await endpoints(conn) == []
            assert sorted(one.state for one in await deliveries(conn)) == ["dead", "delivered"]
            assert await claim_due(conn, T0 + 10**15, 10) == []
            assert await enqueue(conn, endpoint, [(2, "x")], next_leaf_index=3, entropy=entropy, now_ns=T0) == 0

    asyncio.run(scenario())
