"""Quotas on a real Valkey. Its clock cannot be set: waiting is done by moving a scope's stored times back."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from tenancy.quotas.limits import PER_DAY_MAX, PER_MINUTE_MAX, LimitName, ScopeLimits
from tenancy.quotas.quota import UNIT, Lease, Quota, QuotaSnapshot, QuotaUnavailableError, Refused
from tests.tenancy.conftest import OpenRedis, redis_client

ORG = "org_1"


def scope(id_: str, rpm: int | None = None, tpm: int | None = None, cmax: int | None = None) -> ScopeLimits:
    return ScopeLimits(id_, rpm, tpm, cmax, organisation_id=ORG)


def state_key(scope_id: str) -> str:
    return f"bulkhead:quota1:{{{ORG}}}:{scope_id}:state"


async def take(
    quota: Quota, scopes: Sequence[ScopeLimits], lease_id: str, num_tokens: int = 0, ttl_ms: int = 60_000
) -> Lease | Refused:
    return await quota.acquire(scopes, tenant_id="ten_1", lease_id=lease_id, num_tokens=num_tokens, lease_ttl_ms=ttl_ms)


async def wait_us(redis: Redis, scopes: Sequence[ScopeLimits], elapsed_us: int) -> None:
    """Let time pass for these scopes, as the scripts see it."""
    for one in scopes:
        if await redis.exists(state_key(one.scope_id)):
            await redis.hincrby(state_key(one.scope_id), "rt", -elapsed_us)
            await redis.hincrby(state_key(one.scope_id), "tt", -elapsed_us)


async def everything(redis: Redis) -> dict[bytes, Any]:
    """Every key and its content, to see that nothing was written."""
    content: dict[bytes, Any] = {}
    for key in await redis.keys():
        if await redis.type(key) == b"zset":
            content[key] = await redis.zrange(key, 0, -1, withscores=True)
        else:
            content[key] = await redis.hgetall(key)
    return content


limit_values = st.one_of(st.none(), st.integers(0, 8))
four_scopes = st.tuples(
    *(st.tuples(limit_values, limit_values, st.one_of(st.none(), st.integers(0, 3))) for _ in range(4))
)


@given(limits=four_scopes, sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_scopes_or_none(open_redis: OpenRedis, limits: Any, sizes: list[int]) -> None:
    """A request is admitted exactly if it fits everywhere; a refusal leaves every key as it was."""
    scopes = [scope(f"scope_{number}", *values) for number, values in enumerate(limits)]

    async def run() -> None:
        async with open_redis() as redis:
            await redis.flushall()
            quota = Quota(redis)
            num_admitted = num_tokens_admitted = 0
            for number, num_tokens in enumerate(sizes):
                before = await everything(redis)
                result = await take(quota, scopes, f"lease_{number}", num_tokens)
                fits = [
                    (s.requests_per_minute is None or num_admitted < s.requests_per_minute)
                    and (s.tokens_per_minute is None or num_tokens_admitted + num_tokens <= s.tokens_per_minute)
                    and (s.tokens_per_minute != 0)
                    and (s.concurrency_max is None or num_admitted < s.concurrency_max)
                    for s in scopes
                ]
                assert isinstance(result, Lease) == all(fits), result
                if isinstance(result, Refused):
                    assert await everything(redis) == before
                    assert not fits[[s.scope_id for s in scopes].index(result.scope_id)]
                else:
                    num_admitted += 1
                    num_tokens_admitted += num_tokens

    asyncio.run(run())


steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 60), st.integers(0, 60)),
        st.tuples(st.just("release"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("wait"), st.integers(0, 70_000_000), st.just(0)),
    ),
    max_size=30,
)


@given(steps=steps)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_used_never_exceed_the_limit_however_late_the_rest_is_given_back(
    open_redis: OpenRedis, steps: list[tuple[str, int, int]]
) -> None:
    """Against a model that knows from the start what each request will use: the quota never owes less than it."""
    limit = 60
    scopes = [scope("key_1", tpm=limit)]

    async def run() -> None:
        async with open_redis() as redis:
            await redis.flushall()
            quota = Quota(redis)
            leases: list[tuple[Lease, int]] = []
            model_debt = model_time = travelled_us = 0
            for number, (step, amount, used) in enumerate(steps):
                if step == "wait":
                    await wait_us(redis, scopes, amount)
                    travelled_us += amount
                elif step == "release" and leases:
                    lease, used = leases.pop(amount % len(leases))
                    assert await quota.release(lease, used)
                    assert not await quota.release(lease, 0)
                elif step == "take":
                    result = await take(quota, scopes, f"lease_{number}", amount)
                    if isinstance(result, Lease):
                        leases.append((result, min(used, amount)))
                        now = int(await redis.hget(state_key("key_1"), "tt") or 0) + travelled_us
                        model_debt = max(0, model_debt - (now - model_time) * limit) + min(used, amount) * UNIT
                        model_time = now
                        assert model_debt <= limit * UNIT, "more tokens used than the limit admits"
                state = {name: int(value) for name, value in (await redis.hgetall(state_key("key_1"))).items()}
                if state:
                    now = state[b"tt"] + travelled_us
                    assert state[b"td"] >= max(0, model_debt - (now - model_time) * limit)
                    assert 0 <= state[b"td"] <= limit * UNIT
                    assert 0 <= state[b"open"] <= max(0, state[b"td"]) // UNIT

    asyncio.run(run())


def test_unused_tokens_come_back_in_full_and_once(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota, scopes = Quota(redis), [scope("ten_1", tpm=1_000), scope("key_1", tpm=100)]
            leases = [await take(quota, scopes, f"lease_{number}", 30) for number in range(3)]
            assert isinstance(refused := await take(quota, scopes, "lease_3", 30), Refused)
            assert (refused.code, refused.limit_name, refused.scope_id) == (
                "rate_limit_exceeded",
                "tokens_per_minute",
                "key_1",
            )
            for lease in leases:
                assert isinstance(lease, Lease)
                assert await quota.release(lease, 10)
            for lease in leases:
                assert isinstance(lease, Lease)
                assert not await quota.release(lease, 0)  # again: gives nothing back
            now = await quota.usage_now("ten_1", scopes)
            assert (now.remaining_tokens, now.limit_tokens) == (70, 100)
            assert 17_000 < (now.reset_tokens_ms or 0) <= 18_000
            assert (await quota.usage_now("ten_1", scopes[:1])).remaining_tokens == 970

    asyncio.run(run())


def test_retry_after_is_exact(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota, scopes = Quota(redis), [scope("key_1", rpm=7, tpm=1_000)]
            for number in range(7):
                assert isinstance(await take(quota, scopes, f"lease_{number}", 100), Lease)
            refused = await take(quota, scopes, "more", 900)
            assert isinstance(refused, Refused)
            # 600 tokens are missing, 36 s; a request alone would be free in 8.6 s: the longer wait is reported
            assert refused.limit_name == "tokens_per_minute"
            assert 35_000 < refused.retry_after_ms <= 36_000
            await wait_us(redis, scopes, (refused.retry_after_ms - 1_000) * 1_000)
            assert isinstance(await take(quota, scopes, "early", 900), Refused)
            await wait_us(redis, scopes, 1_000_000)
            assert isinstance(await take(quota, scopes, "in time", 900), Lease)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("limits", "limit_name"),
    [
        ((0, None, None), "requests_per_minute"),
        ((5, 99, 5), "tokens_per_minute"),
        ((1, 0, 1), "tokens_per_minute"),
        ((None, None, 0), "concurrency_max"),
    ],
)
def test_what_can_never_fit_is_said_so(open_redis: OpenRedis, limits: Any, limit_name: str) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            result = await take(Quota(redis), [scope("ten_1"), scope("key_1", *limits)], "lease", 100)
            assert isinstance(result, Refused)
            assert (result.code, result.limit_name, result.retry_after_ms) == ("never_fits", limit_name, 0)
            assert result.scope_id == "key_1"

    asyncio.run(run())


def test_fifty_at_once_never_exceed_the_concurrency(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota, scopes = Quota(redis), [scope("ten_1", cmax=9), scope("key_1", cmax=7)]
            results = await asyncio.gather(*(take(quota, scopes, f"lease_{number}") for number in range(50)))
            leases = [result for result in results if isinstance(result, Lease)]
            assert len(leases) == 7
            assert {r.code for r in results if isinstance(r, Refused)} == {"concurrency_exceeded"}
            assert (await quota.usage_now("ten_1", scopes)).num_leases == 7
            assert await quota.release(leases[0], 0)
            assert isinstance(await take(quota, scopes, "next"), Lease)
            assert isinstance(await take(quota, scopes, "one more"), Refused)

    asyncio.run(run())


def test_a_lease_that_nobody_renews_frees_its_slot_and_gives_nothing_back(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota, scopes = Quota(redis), [scope("key_1", tpm=100, cmax=2)]
            lost = await take(quota, scopes, "lost", 40, ttl_ms=1_000)
            kept = await take(quota, scopes, "kept", 40, ttl_ms=1_000)
            assert isinstance(lost, Lease)
            assert isinstance(kept, Lease)
            assert isinstance(await take(quota, scopes, "third", 1), Refused)
            for _ in range(4):
                await asyncio.sleep(0.3)
                assert await quota.renew(kept)
            assert not await quota.renew(lost)
            assert not await quota.release(lost, 0)
            assert isinstance(await take(quota, scopes, "third", 1), Lease)
            assert isinstance(await take(quota, scopes, "fourth", 1), Refused)
            left = (await quota.usage_now("ten_1", scopes)).remaining_tokens or 0
            assert 19 <= left < 40, "only time gives tokens back, at 5 in 3 seconds"

    asyncio.run(run())


def test_the_same_lease_asked_for_twice_is_counted_once(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota, scopes = Quota(redis), [scope("key_1", rpm=1, tpm=10, cmax=1)]
            assert isinstance(await take(quota, scopes, "lease", 10), Lease)
            assert isinstance(await take(quota, scopes, "lease", 10), Lease)
            assert isinstance(await take(quota, scopes, "other", 10), Refused)

    asyncio.run(run())


def test_an_organisation_limit_is_shared_by_its_tenants(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota, shared = Quota(redis), scope("org_1", rpm=3)

            async def as_tenant(tenant_id: str, lease_id: str) -> Lease | Refused:
                return await quota.acquire(
                    [shared, scope(tenant_id, rpm=2)],
                    tenant_id=tenant_id,
                    lease_id=lease_id,
                    num_tokens=0,
                    lease_ttl_ms=1_000,
                )

            assert isinstance(await as_tenant("ten_1", "a"), Lease)
            assert isinstance(await as_tenant("ten_1", "b"), Lease)
            assert isinstance(await as_tenant("ten_2", "c"), Lease)
            refused = await as_tenant("ten_2", "d")
            assert isinstance(refused, Refused)
            assert refused.scope_id == "org_1"
            with pytest.raises(ValueError, match="several organisations"):
                await take(quota, [shared, ScopeLimits("x", organisation_id="org_2")], "lease")

    asyncio.run(run())


def test_the_largest_limits_are_counted_exactly(open_redis: OpenRedis) -> None:
    """Lua's numbers are doubles: one token of 100,000,000 must still make the difference."""

    async def run() -> None:
        async with open_redis() as redis:
            quota, scopes = Quota(redis), [scope("key_1", tpm=PER_MINUTE_MAX)]
            key = state_key("key_1")
            assert isinstance(await take(quota, scopes, "lease", PER_MINUTE_MAX), Lease)
            assert await redis.hget(key, "td") == b"6000000000000000"
            far_us = 2**52  # a clock far ahead: nothing drains while we count
            await redis.hset(key, "tt", str(far_us))
            await redis.hset(key, "td", str(PER_MINUTE_MAX * UNIT - 3 * UNIT + 1))
            assert isinstance(await take(quota, scopes, "three", 3), Refused)
            assert isinstance(await take(quota, scopes, "two", 2), Lease)
            assert await redis.hget(key, "td") == str(PER_MINUTE_MAX * UNIT - UNIT + 1).encode()

    asyncio.run(run())


def test_a_changed_limit_keeps_what_is_owed(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota = Quota(redis)
            assert isinstance(await take(quota, [scope("key_1", tpm=1_000)], "lease", 600), Lease)
            assert (await quota.usage_now("ten_1", [scope("key_1", tpm=700)])).remaining_tokens == 100
            lowered = await quota.usage_now("ten_1", [scope("key_1", tpm=100)])
            assert lowered.remaining_tokens == 0
            assert 359_000 < (lowered.reset_tokens_ms or 0) <= 360_000  # 600 tokens at 100 a minute
            assert isinstance(await take(quota, [scope("key_1", rpm=5)], "other", 600), Lease)  # no token limit
            assert (await quota.usage_now("ten_1", [scope("key_1", tpm=1_000)])).remaining_tokens == 400

    asyncio.run(run())


def test_without_limits_everything_is_admitted_and_nothing_is_said(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota, scopes = Quota(redis), [scope("ten_1"), scope("key_1")]
            lease = await take(quota, scopes, "lease", 10**12)
            assert isinstance(lease, Lease)
            assert lease.snapshot == QuotaSnapshot(num_leases=1)
            assert await quota.release(lease, 5)
            assert await quota.usage_now("ten_1", scopes) == QuotaSnapshot()

    asyncio.run(run())


def test_a_server_that_lost_its_scripts_is_given_them_again(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota, scopes = Quota(redis), [scope("key_1", rpm=5)]
            for number in range(3):
                lease = await take(quota, scopes, f"lease_{number}")
                assert isinstance(lease, Lease)
                await redis.script_flush()
                assert await quota.renew(lease)
                await redis.script_flush()
                assert await quota.release(lease, 0)
            assert (await quota.usage_now("ten_1", scopes)).remaining_requests == 2

    asyncio.run(run())


def test_answers_are_read_alike_when_the_client_decodes(valkey_socket: Path, open_redis: OpenRedis) -> None:
    async def run() -> None:
        redis = Redis(unix_socket_path=str(valkey_socket), decode_responses=True)
        try:
            lease = await take(Quota(redis), [scope("key_1", rpm=5)], "lease")
            assert isinstance(lease, Lease)
            assert (lease.snapshot.limit_requests, lease.snapshot.remaining_requests) == (5, 4)
        finally:
            await redis.aclose()

    asyncio.run(run())


def test_a_lost_server_is_an_error_of_ours(tmp_path: Path) -> None:
    async def run() -> None:
        redis = redis_client(tmp_path / "nobody.sock")
        quota, scopes = Quota(redis), [scope("key_1", rpm=5)]
        lease = Lease("lease", "ten_1", tuple(scopes), 0, 1_000, QuotaSnapshot())
        for call in (
            take(quota, scopes, "lease"),
            quota.renew(lease),
            quota.release(lease, 0),
            quota.usage_now("ten_1", scopes),
        ):
            with pytest.raises(QuotaUnavailableError):
                await call
        await redis.aclose()

    asyncio.run(run())


@pytest.mark.parametrize("bad", [-1, 1.0, True, PER_MINUTE_MAX + 1])
def test_limits_that_cannot_be_counted_are_refused(bad: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=str(bad)):
        ScopeLimits("key_1", tokens_per_minute=bad)


def daily(id_: str, tpd: int | None, *shadow: LimitName, **limits: int) -> ScopeLimits:
    return ScopeLimits(id_, organisation_id=ORG, tokens_per_day=tpd, shadow=frozenset(shadow), **limits)


@given(steps=st.lists(st.tuples(st.sampled_from(["take", "give", "night"]), st.integers(0, 60)), max_size=25))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_of_a_day_are_counted_until_midnight(open_redis: OpenRedis, steps: list[tuple[str, int]]) -> None:
    """Against a model; midnight comes by dating the state a day back."""
    scopes = [daily("tenant_1", 100), daily("key_1", 70)]

    async def run() -> None:
        async with open_redis() as redis:
            await redis.flushall()
            quota = Quota(redis)
            used, leases, days = 0, list[tuple[Lease, int]](), 0
            begun = (await redis.time())[0] // 86_400
            for number, (step, amount) in enumerate(steps):
                if (await redis.time())[0] // 86_400 != begun:
                    return  # a real midnight
                if step == "night":
                    used, days = 0, days + 1
                    for one in scopes:
                        if await redis.exists(state_key(one.scope_id)):
                            await redis.hincrby(state_key(one.scope_id), "dn", -1)
                    for lease, _ in leases:  # they were placed yesterday
                        for one in scopes:
                            field = f"day:{state_key(one.scope_id)}"
                            await redis.hincrby(f"bulkhead:quota1:{{{ORG}}}:lease:{lease.lease_id}", field, -1)
                elif step == "take":
                    result = await take(quota, scopes, f"lease_{number}", amount)
                    assert isinstance(result, Lease) == (used + amount <= 70)
                    if isinstance(result, Lease):
                        used += amount
                        leases.append((result, days))
                        assert result.snapshot.remaining_tokens_per_day == 70 - used
                    else:
                        assert (result.code, result.limit_name) == ("rate_limit_exceeded", "tokens_per_day")
                        assert 0 < result.retry_after_ms <= 86_400_000
                elif leases:
                    lease, day = leases.pop(amount % len(leases))
                    assert await quota.release(lease, lease.num_tokens // 3)
                    assert not await quota.release(lease, 0)  # once
                    if day == days:
                        used -= lease.num_tokens - lease.num_tokens // 3
            left = await quota.usage_now("ten_1", scopes)
            assert left.remaining_tokens_per_day == 70 - used

    asyncio.run(run())


def test_what_a_day_never_holds_is_never_admitted(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            refused = await take(Quota(redis), [daily("key_1", PER_DAY_MAX)], "l1", PER_DAY_MAX + 5)
            assert isinstance(refused, Refused)
            assert (refused.code, refused.limit_name, refused.retry_after_ms) == ("never_fits", "tokens_per_day", 0)

    asyncio.run(run())


@given(limits=st.tuples(limit_values, limit_values, st.one_of(st.none(), st.integers(0, 20))), data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_limit_in_shadow_tells_what_it_would_have_refused(open_redis: OpenRedis, limits: Any, data: Any) -> None:
    """The same requests against the same limit, enforced and in shadow: refused here where it is named there."""
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    rpm, tpm, tpd = limits
    named: dict[LimitName, int | None] = {
        "requests_per_minute": rpm,
        "tokens_per_minute": tpm,
        "tokens_per_day": tpd,
    }

    async def run() -> None:
        for name, value in named.items():
            if value is None:
                continue
            async with open_redis() as redis:
                await redis.flushall()
                quota, only = Quota(redis), {name: value}
                real = [ScopeLimits("real", organisation_id=ORG, **only)]  # type: ignore[arg-type]
                shadow = [ScopeLimits("seen", organisation_id=ORG, shadow=frozenset({name}), **only)]  # type: ignore[arg-type]
                for number, size in enumerate(sizes):
                    refused = await take(quota, real, f"real_{number}", size)
                    lease = await take(quota, shadow, f"seen_{number}", size)
                    assert isinstance(lease, Lease)
                    assert lease.would_refuse == ((("seen", name),) if isinstance(refused, Refused) else ())
                    assert lease.snapshot.limit_requests is lease.snapshot.limit_tokens is None
                    if isinstance(refused, Lease) and size % 2:
                        assert await quota.release(refused, size // 2)
                        assert await quota.release(lease, size // 2)

    asyncio.run(run())


def test_more_at_once_than_a_limit_in_shadow_is_told(open_redis: OpenRedis) -> None:
    async def run() -> None:
        async with open_redis() as redis:
            quota, scopes = Quota(redis), [daily("key_1", None, "concurrency_max", concurrency_max=1)]
            first, second = [await take(quota, scopes, id_) for id_ in ("l1", "l2")]
            assert isinstance(first, Lease)
            assert isinstance(second, Lease)
            assert (first.would_refuse, second.would_refuse) == ((), (("key_1", "concurrency_max"),))
            assert second.snapshot.concurrency_max is None

    asyncio.run(run())
