"""Limits that are lowered and raised while requests are in flight: what is held stays and counts against what comes.

A lower limit binds the next request, never one that was admitted: nothing is cut short or taken back for it, and
nothing more is admitted until used and held are below it again. So used + held <= limit at every admission, and what
stands above a limit can only shrink. (A credit line is money that is owed: it is not lowered below what is used and
held at all, and test_credit_line.py has that.)
"""

import asyncio
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenancy.accounts.budget_use import budget_uses
from tenancy.accounts.budgets import set_budget
from tenancy.accounts.ledger import Hold, capture, place_hold, void
from tenancy.quotas.limits import ScopeLimits
from tenancy.quotas.quota import Lease, Quota
from tests.tenancy.books import MONTH_NS, open_books
from tests.tenancy.conftest import OpenRedis, create_tables, opened
from tests.tenancy.test_quota import ORG, daily, take
from tests.tenancy.world import SECOND, counting_entropy

QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
quota_steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 12)),
        st.tuples(st.just("take"), st.integers(0, 12)),
        st.tuples(st.just("give"), st.integers(0, 9)),
        st.tuples(st.just("limit"), st.tuples(st.integers(0, 4), st.integers(0, 80))),
    ),
    min_size=12,  # short ones never stand above a limit
    max_size=30,
)


@given(steps=quota_steps)
@QUIET
def test_a_lower_quota_counts_what_is_held(open_redis: OpenRedis, steps: list[tuple[str, Any]]) -> None:
    """Slots and tokens of a day, of a tenant whose key has wider limits that stay."""

    async def run() -> None:
        async with open_redis() as redis:
            await redis.flushall()
            quota = Quota(redis)
            slots_max, tokens_max, used = 3, 60, 0
            held: list[Lease] = []
            begun = (await redis.time())[0] // 86_400
            for number, (step, how) in enumerate(steps):
                if (await redis.time())[0] // 86_400 != begun:
                    return  # midnight: the day's counters begin anew
                scopes: list[ScopeLimits] = [
                    daily("tenant_1", tokens_max, concurrency_max=slots_max),
                    ScopeLimits("key_1", organisation_id=ORG, concurrency_max=9, tokens_per_day=10**6),
                ]
                total = used + sum(lease.num_tokens for lease in held)
                if step == "limit":
                    slots_max, tokens_max = how
                elif step == "take":
                    made = await take(quota, scopes, f"lease_{number}", how)
                    fits = len(held) < slots_max and total + how <= tokens_max > 0
                    assert isinstance(made, Lease) == fits, (len(held), slots_max, total, how, tokens_max)
                    if isinstance(made, Lease):
                        held.append(made)
                elif held:
                    lease = held.pop(how % len(held))
                    assert await quota.release(lease, lease.num_tokens // 2)  # it had its slot to the end
                    used += lease.num_tokens // 2
                now = await quota.usage_now("ten_1", [daily("tenant_1", tokens_max, concurrency_max=slots_max)])
                total = used + sum(lease.num_tokens for lease in held)
                assert now.num_leases == len(held)
                assert now.remaining_tokens_per_day == max(0, tokens_max - total)

    asyncio.run(run())


budget_steps = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.integers(1, 40)),
        st.tuples(st.just("hold"), st.integers(1, 40)),
        st.tuples(st.just("settle"), st.integers(0, 100)),
        st.tuples(st.just("limit"), st.integers(0, 120)),
    ),
    min_size=10,
    max_size=25,
)


@given(steps=budget_steps)
@settings(QUIET, max_examples=15)
def test_a_lower_hard_budget_counts_what_is_held(tmp_path_factory: Any, steps: list[tuple[str, int]]) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('lowered') / 'bulkhead.db'}"

    async def run() -> None:
        await create_tables(url)
        async with opened(url) as database, database.transaction() as conn:
            who = (await open_books(conn, counting_entropy())).who
            limit, used, held = 100, 0, dict[str, int]()
            budget: dict[str, Any] = {"hard": True, "now_ns": MONTH_NS}
            await set_budget(conn, "tenant", who.tenant_id, "total", limit_nano_usd=limit, **budget)
            for number, (step, how) in enumerate(steps):
                before = used + sum(held.values())
                if step == "limit":
                    limit = how
                    await set_budget(conn, "tenant", who.tenant_id, "total", limit_nano_usd=limit, **budget)
                elif step == "hold":
                    made = await place_hold(
                        conn,
                        hold_id=f"hold_{number}",
                        tenant_id=who.tenant_id,
                        request_id=f"req_{number}",
                        price_id=who.price_id,
                        amount_nano_usd=how,
                        expires_ns=MONTH_NS + 60 * SECOND,
                        now_ns=MONTH_NS,
                    )
                    assert isinstance(made, Hold) == (before + how <= limit), (before, how, limit)
                    if isinstance(made, Hold):
                        held[made.hold_id] = how
                elif held:
                    hold_id, amount = held.popitem()
                    part = amount * how // 100  # what was promised can be charged, whatever the limit is now
                    await (capture(conn, hold_id, part, MONTH_NS) if part else void(conn, hold_id, MONTH_NS))
                    used += part
                (use,) = await budget_uses(conn, who.tenant_id, MONTH_NS)
                assert (use.used_nano_usd, use.held_nano_usd) == (used, sum(held.values()))
                after = used + sum(held.values())
                assert after <= max(limit, before), "above a limit it only shrinks"

    asyncio.run(run())
