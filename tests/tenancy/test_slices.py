"""Slices in the store: kept apart from what others take, counted as spent when they end without a word."""

import asyncio
from typing import Any

from redis.asyncio import Redis

from tenancy.quotas.limits import ScopeLimits
from tenancy.quotas.quota import EpochMismatch, Lease, Quota, Refused
from tenancy.quotas.quota_epochs import Counted, Counters
from tenancy.quotas.slices import Slice, Slices
from tests.tenancy.conftest import OpenRedis

ORG = "org_1"
DAY = 20_000


def scope(**limits: int) -> ScopeLimits:
    return ScopeLimits("ten_1", organisation_id=ORG, **limits)


async def begun(redis: Redis) -> Quota:
    await redis.flushall()
    quota = Quota(redis)
    await quota.rebuild(Counters(ORG, DAY, {ORG: Counted()}), epoch="e1", lease_ttl_ms=60_000)
    return quota


async def take(quota: Quota, limits: ScopeLimits, lease_id: str, num_tokens: int) -> Any:
    return await quota.acquire(
        [limits], tenant_id="ten_1", lease_id=lease_id, num_tokens=num_tokens, lease_ttl_ms=60_000, epoch="e1"
    )


async def cut(quota: Quota, limits: ScopeLimits, gateway_id: str = "a", ttl_ms: int = 60_000) -> Any:
    return await quota.cut([limits], epoch="e1", gateway_id=gateway_id, ttl_ms=ttl_ms, percent=20)


def test_others_have_that_much_less_of_every_limit(open_redis: OpenRedis) -> None:
    async def run() -> None:
        for limits, largest in (
            ({"tokens_per_minute": 100}, 80),
            ({"tokens_per_day": 100}, 80),
            ({"tokens_per_minute": 1_000, "tokens_per_day": 100}, 80),
        ):
            async with open_redis() as redis:
                quota, one = await begun(redis), scope(**limits)
                await cut(quota, one)
                assert isinstance(await take(quota, one, "too much", largest + 1), Refused)
                assert isinstance(await take(quota, one, "all", largest), Lease)
        async with open_redis() as redis:
            quota, one = await begun(redis), scope(requests_per_minute=10, concurrency_max=10)
            assert await cut(quota, one) == [(2, 0, 2, 0)]
            found = [await take(quota, one, f"l{number}", 0) for number in range(10)]
            assert sum(isinstance(each, Lease) for each in found) == 8

    asyncio.run(run())


def test_gateways_share_what_there_is_and_a_slice_is_replaced_by_the_next(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota, one = await begun(redis), scope(tokens_per_minute=100)
            assert isinstance(await take(quota, one, "others", 70), Lease)
            for _ in range(3):
                assert await cut(quota, one, "a") == [(0, 20, 0, 0)]
            assert await cut(quota, one, "b") == [(0, 10, 0, 0)]
            assert await cut(quota, one, "c") == [(0, 0, 0, 0)]
            assert await cut(quota, one, "a", ttl_ms=0) == [(0, 0, 0, 0)]
            left = await quota.usage_now("ten_1", [one])
            assert 20 <= (left.remaining_tokens or 0) <= 22

    asyncio.run(run())


def test_a_slice_that_ends_without_a_word_was_spent(open_redis: OpenRedis) -> None:
    """And its debt drains from then on, also when every look since then was refused."""

    async def run() -> None:
        async with open_redis() as redis:
            quota, one = await begun(redis), scope(tokens_per_minute=100, requests_per_minute=1, tokens_per_day=200)
            await cut(quota, one, ttl_ms=40)
            await asyncio.sleep(0.06)
            left = await quota.usage_now("ten_1", [one])
            assert 80 <= (left.remaining_tokens or 0) <= 82
            assert left.remaining_requests == 0
            assert left.remaining_tokens_per_day == 160
            key = f"bulkhead:quota1:{{{ORG}}}:ten_1:state"
            content = (await redis.hget(key, "sl")).decode()
            name, expiry, amounts = content.split(",", 2)
            for seconds in (10, 30, 61):
                ended_ms = int(expiry) - seconds * 1_000
                await redis.hset(key, "sl", f"{name},{ended_ms},{amounts}")
                for drained in ("rt", "tt"):
                    await redis.hset(key, drained, str(ended_ms * 1_000 - 1))
                refused = await take(quota, one, f"l{seconds}", 1)
                assert isinstance(refused, Lease) == (seconds == 61), "one request a minute"

    asyncio.run(run())


def test_nothing_is_cut_or_taken_under_another_epoch(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota, one = await begun(redis), scope(tokens_per_minute=100)
            await redis.flushall()
            assert isinstance(await cut(quota, one), EpochMismatch)
            assert isinstance(await take(quota, one, "lease", 1), EpochMismatch)
            assert await redis.keys() == []

    asyncio.run(run())


def test_a_request_is_paid_from_every_slice_or_from_none() -> None:
    tenant, key = scope(tokens_per_minute=10), ScopeLimits("key_1", requests_per_minute=2, organisation_id=ORG)
    slices = Slices()
    slices.put(Slice(tenant, "e1", 100, 0, 10, 0, 0))
    slices.put(Slice(key, "e1", 100, 2, 0, 0, 0))
    assert slices.spend([tenant, key], 6, 0) is not None
    assert slices.spend([tenant, key], 6, 0) is None, "the tenant's has four left"
    assert slices.spend([tenant, key], 4, 100) is None, "it has ended"
    assert slices.spend([scope(tokens_per_minute=11), key], 4, 0) is None, "it was cut from another limit"
    assert slices.spend([tenant, key], 4, 99) is not None, "what was refused took nothing"
    assert slices.spend([tenant, key], 0, 99) is None, "two requests were all"
