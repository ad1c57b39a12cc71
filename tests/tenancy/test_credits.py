"""Credits against a model of a few lines, in any order and over their ends; then each rule, and at once."""

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.database import Database
from tenancy.accounts.corrections import adjust, refund
from tenancy.accounts.credits import CreditKind, list_credits, tenants_with_due_credit
from tenancy.accounts.ledger import (
    Balance,
    Hold,
    InsufficientCredit,
    LedgerConflictError,
    balance,
    capture,
    expire_credit,
    grant_credit,
    place_hold,
    void,
)
from tenancy.accounts.ledger_check import check_ledger
from tests.tenancy.conftest import opened
from tests.tenancy.test_budgets import CREDIT, prepared
from tests.tenancy.test_ledger import MEMORY_DISK
from tests.tenancy.world import SECOND, T0, Populated, counting_entropy, populate

KINDS: tuple[CreditKind, ...] = ("promotional", "paid")


class Model:
    """Credits as a list: (kind, end or None, number) and what is left; and what is held."""

    def __init__(self) -> None:
        self.left: dict[tuple[str, int | None, int], int] = {("paid", None, -1): CREDIT}
        self.held = self.expired = 0

    @property
    def credit(self) -> int:
        return sum(self.left.values()) - self.held

    def order(self, now: int) -> list[tuple[str, int | None, int]]:
        def rank(one: tuple[str, int | None, int]) -> Any:
            kind, end, number = one
            dead = end is not None and end <= now
            return (not dead, kind == "paid", end is None, end or 0, number)

        return sorted((one for one, left in self.left.items() if left), key=rank)

    def take(self, amount: int, now: int) -> None:
        for one in self.order(now):
            used = min(amount, self.left[one])
            self.left[one] -= used
            amount -= used
        assert amount == 0

    def expire(self, now: int) -> None:
        """What has ended and is not held: of those that would be used last, first."""
        due = [one for one in self.order(now) if one[1] is not None and one[1] <= now]
        free = sum(self.left[one] for one in due) - self.held
        for one in reversed(due):
            gone = max(0, min(free, self.left[one]))
            self.left[one] -= gone
            free -= gone
            self.expired += gone


class CreditWorld:
    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = TemporaryDirectory(dir=MEMORY_DISK)
        template, self.ids = prepared()
        path = Path(self.folder.name) / "bulkhead.db"
        path.write_bytes(template)
        self.database = Database(f"sqlite+aiosqlite:///{path}")
        self.model = Model()
        self.now = T0
        self.holds: list[tuple[str, int]] = []
        self.number = 0

    def close(self) -> None:
        self.runner.run(self.database.dispose())
        self.runner.close()
        self.folder.cleanup()

    def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        async def in_transaction() -> Any:
            async with self.database.transaction() as conn:
                return await function(conn, *args, **kwargs)

        self.number += 1
        return self.runner.run(in_transaction())

    def grant(self, amount: int, kind: CreditKind, seconds: int) -> None:
        end = self.now + seconds * SECOND if seconds else None
        number = self.number
        how: dict[str, Any] = {"transfer_id": f"t{number}", "now_ns": self.now, "kind": kind, "expires_ns": end}
        for _ in range(2):  # a repeat changes nothing
            self.run(grant_credit, self.ids["tenant"], amount, **how)
        self.model.left[kind, end, number] = amount

    def wait(self, seconds: int, look: bool) -> None:
        self.now += seconds * SECOND
        if look:
            self.run(expire_credit, self.ids["tenant"], self.now)
            self.model.expire(self.now)

    def place(self, percent: int) -> None:
        self.model.expire(self.now)
        amount = max(1, self.model.credit * percent // 100)
        made = self.run(
            place_hold,
            hold_id=f"hold_{self.number}",
            tenant_id=self.ids["tenant"],
            request_id=f"req_{self.number}",
            price_id=self.ids["price"],
            amount_nano_usd=amount,
            expires_ns=self.now + 600 * SECOND,
            now_ns=self.now,
        )
        assert isinstance(made, InsufficientCredit) == (amount > self.model.credit)
        if isinstance(made, Hold):
            self.holds.append((made.hold_id, amount))
            self.model.held += amount

    def settle(self, which: int, percent: int) -> None:
        if not self.holds:
            return
        hold_id, amount = self.holds.pop(which % len(self.holds))
        cost = amount * percent // 100
        if percent:
            self.run(capture, hold_id, cost, self.now)
        else:
            self.run(void, hold_id, self.now)
        self.model.held -= amount
        self.model.take(cost, self.now)
        self.model.expire(self.now)

    def compare(self) -> None:
        self.run(self.agrees)

    async def agrees(self, conn: Any) -> None:
        now = await balance(conn, self.ids["tenant"])
        assert (now.credit_nano_usd, now.held_nano_usd) == (self.model.credit, self.model.held)
        assert now.credit_nano_usd >= 0
        found = await list_credits(conn, self.ids["tenant"], self.now)
        assert [(c.kind, c.expires_ns, c.left_nano_usd) for c in found] == [
            (kind, end, self.model.left[kind, end, number]) for kind, end, number in self.model.order(self.now)
        ]
        check = await check_ledger(conn)
        assert check.ok, check


STEPS = st.one_of(
    st.tuples(st.just(CreditWorld.grant), st.tuples(st.integers(1, 10**6), st.sampled_from(KINDS), st.integers(0, 90))),
    st.tuples(st.just(CreditWorld.wait), st.tuples(st.integers(1, 60), st.booleans())),
    st.tuples(st.just(CreditWorld.place), st.tuples(st.integers(1, 120))),
    st.tuples(st.just(CreditWorld.settle), st.tuples(st.integers(0, 5), st.sampled_from([0, 30, 100]))),
)


@given(steps=st.lists(STEPS, min_size=10, max_size=30))
@settings(max_examples=max(10, settings.default.max_examples // 4), derandomize=settings.default.max_examples <= 40)
def test_credits_are_used_in_order_and_end_when_nobody_holds_them(steps: list[Any]) -> None:
    world = CreditWorld()
    try:
        for method, arguments in steps:
            method(world, *arguments)
            world.compare()
    finally:
        world.close()


async def _granted(database: Database) -> Populated:
    """60 that end in a minute, and 100 that do not."""
    async with database.transaction() as conn:
        made = await populate(conn, entropy=counting_entropy())
        promotional: Any = {"kind": "promotional", "expires_ns": T0 + 60 * SECOND}
        await grant_credit(conn, made.tenant_id, 100, transfer_id="paid", now_ns=T0)
        await grant_credit(conn, made.tenant_id, 60, transfer_id="promo", now_ns=T0, **promotional)
    return made


async def _hold(conn: Any, made: Populated, hold_id: str, amount: int, now_ns: int) -> Hold | InsufficientCredit:
    return await place_hold(
        conn,
        hold_id=hold_id,
        tenant_id=made.tenant_id,
        request_id=f"req_{hold_id}",
        price_id=made.price_id,
        amount_nano_usd=amount,
        expires_ns=T0 + 10_000 * SECOND,
        now_ns=now_ns,
    )


def test_what_runs_over_the_end_may_still_use_what_it_holds(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database:
            made = await _granted(database)
            end = T0 + 60 * SECOND
            async with database.transaction() as conn:
                await _hold(conn, made, "h1", 50, end - 1)
                assert await tenants_with_due_credit(conn, end - 1, 9) == []
                assert await tenants_with_due_credit(conn, end, 9) == [made.tenant_id]
                (gone,) = await expire_credit(conn, made.tenant_id, end)
                assert (gone.credit_id, gone.kind, gone.amount_nano_usd) == ("promo", "promotional", 10)
                assert await expire_credit(conn, made.tenant_id, end) == ()
                assert await tenants_with_due_credit(conn, end, 9) == []
                assert await balance(conn, made.tenant_id) == Balance(100, 50, 0)
            async with database.transaction() as conn:
                settled = await capture(conn, "h1", 20, end + SECOND)
                assert [(one.credit_id, one.amount_nano_usd) for one in settled.expired] == [("promo", 30)]
                assert await capture(conn, "h1", 20, end + SECOND) != settled  # a repeat has nothing to log
                assert await balance(conn, made.tenant_id) == Balance(100, 0, 20)
                assert [one.left_nano_usd for one in await list_credits(conn, made.tenant_id, end)] == [100]
                assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_nothing_is_admitted_on_credit_that_has_ended(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database:
            made = await _granted(database)
            async with database.transaction() as conn:
                refused = await _hold(conn, made, "h1", 101, T0 + 60 * SECOND)
                assert refused == InsufficientCredit(100, 101)
                assert [one.amount_nano_usd for one in refused.expired] == [60]
                held = await _hold(conn, made, "h1", 100, T0 + 60 * SECOND)
                assert isinstance(held, Hold)

    asyncio.run(run())


def test_corrections_come_back_as_paid_credit_and_take_from_what_they_name(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=counting_entropy())
            promotional: Any = {"kind": "promotional", "expires_ns": T0 + 60 * SECOND}
            await grant_credit(conn, made.tenant_id, 100, transfer_id="paid", now_ns=T0)
            await grant_credit(conn, made.tenant_id, 60, transfer_id="promo", now_ns=T0, **promotional)
            for other in ({**promotional, "kind": "paid"}, {**promotional, "expires_ns": T0 + 61 * SECOND}, {}):
                with pytest.raises(LedgerConflictError, match="promo"):
                    await grant_credit(conn, made.tenant_id, 60, transfer_id="promo", now_ns=T0, **other)
            with pytest.raises(ValueError, match="later than now"):
                await grant_credit(conn, made.tenant_id, 1, transfer_id="late", now_ns=T0, expires_ns=T0)
            await _hold(conn, made, "h1", 80, T0)
            await capture(conn, "h1", 80, T0)  # 60 of it promotional
            await refund(conn, "req_h1", 70, transfer_id="r1", reason="", now_ns=T0)
            how: Any = {"reason": "", "now_ns": T0}
            await adjust(conn, made.tenant_id, -30, transfer_id="a1", corrects_id="paid", **how)
            await adjust(conn, made.tenant_id, 5, transfer_id="a2", **how)
            left = {one.credit_id: one.left_nano_usd for one in await list_credits(conn, made.tenant_id, T0)}
            assert left == {"paid": 50, f"{made.tenant_id}:corrections": 75}
            assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_expiries_and_settlements_at_once_lose_nothing(postgres_url: str) -> None:
    async def run() -> None:
        async with opened(postgres_url) as database:
            made = await _granted(database)
            end = T0 + 60 * SECOND
            async with database.transaction() as conn:
                for number in range(6):
                    await _hold(conn, made, f"h{number}", 20, T0)

            async def settle(number: int) -> int:
                async with database.transaction() as conn:
                    settled = await (
                        capture(conn, f"h{number}", 5, end) if number % 2 else void(conn, f"h{number}", end)
                    )
                    return sum(one.amount_nano_usd for one in settled.expired)

            async def sweep() -> int:
                async with database.transaction() as conn:
                    return sum(one.amount_nano_usd for one in await expire_credit(conn, made.tenant_id, end))

            gone = await asyncio.gather(*(settle(number) for number in range(6)), *(sweep() for _ in range(6)))
            async with database.read() as conn:
                assert sum(gone) == 60 - 15  # the three that cost something took from what had ended
                assert await balance(conn, made.tenant_id) == Balance(100, 0, 15)
                assert (await check_ledger(conn)).ok

    asyncio.run(run())
