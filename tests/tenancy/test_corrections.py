"""Refunds are at most what was charged and adjustments leave no debt, in any order and at once, on both databases."""

import asyncio
from typing import Any

import pytest

from tenancy.accounts.budget_use import budget_uses
from tenancy.accounts.budgets import set_budget
from tenancy.accounts.corrections import (
    CorrectionError,
    adjust,
    captured_hold,
    refund,
    refundable_nano_usd,
    refunded_nano_usd,
)
from tenancy.accounts.ledger import Balance, LedgerConflictError, balance, capture, grant_credit, place_hold
from tenancy.accounts.ledger_check import check_ledger
from tests.tenancy.conftest import opened
from tests.tenancy.world import SECOND, T0, Populated, counting_entropy, populate


async def billed(conn: Any, charged: int = 60) -> Populated:
    """A tenant with 1,000 of credit and a request that cost `charged`."""
    made = await populate(conn, entropy=counting_entropy())
    await grant_credit(conn, made.tenant_id, 1_000, transfer_id="first", now_ns=T0)
    await place_hold(
        conn,
        hold_id="hold_1",
        tenant_id=made.tenant_id,
        request_id="req_1",
        price_id=made.price_id,
        amount_nano_usd=100,
        expires_ns=T0 + 60 * SECOND,
        now_ns=T0,
    )
    await capture(conn, "hold_1", charged, T0)
    return made


async def give_back(conn: Any, amount: int, transfer_id: str, reason: str = "sorry") -> None:
    await refund(conn, "req_1", amount, transfer_id=transfer_id, reason=reason, now_ns=T0)


def test_a_request_is_refunded_up_to_what_it_cost(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            made = await billed(conn)
            await set_budget(conn, "tenant", made.tenant_id, "day", hard=True, limit_nano_usd=90, now_ns=T0)
            await give_back(conn, 40, "r1")
            await give_back(conn, 40, "r1")  # a repeat: nothing moves
            assert await balance(conn, made.tenant_id) == Balance(980, 0, 20)
            with pytest.raises(LedgerConflictError, match="r1"):
                await give_back(conn, 39, "r1")
            with pytest.raises(LedgerConflictError, match="first"):
                await give_back(conn, 10, "first")
            with pytest.raises(CorrectionError, match="20 nano-units are left to refund, not 21"):
                await give_back(conn, 21, "r2")
            await give_back(conn, 20, "r2")
            with pytest.raises(CorrectionError, match="0 nano-units are left"):
                await give_back(conn, 1, "r3")
            assert await balance(conn, made.tenant_id) == Balance(1_000, 0, 0)
            assert await refundable_nano_usd(conn, await captured_hold(conn, "req_1")) == 0
            assert await refunded_nano_usd(conn, made.tenant_id) == 60
            (use,) = await budget_uses(conn, made.tenant_id, T0)
            assert use.used_nano_usd == 60  # what was charged
            assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_only_what_was_billed_is_refunded(sqlite_url: str) -> None:
    async def run() -> None:
        async with opened(sqlite_url) as database, database.transaction() as conn:
            made = await billed(conn)
            await place_hold(
                conn,
                hold_id="hold_2",
                tenant_id=made.tenant_id,
                request_id="req_2",
                price_id=made.price_id,
                amount_nano_usd=100,
                expires_ns=T0 + 60 * SECOND,
                now_ns=T0,
            )
            for request_id in ("req_2", "req_none"):
                with pytest.raises(CorrectionError, match=request_id):
                    await refund(conn, request_id, 1, transfer_id="r", reason="", now_ns=T0)
            for amount in (1.5, True, 0):
                with pytest.raises((TypeError, ValueError)):
                    await refund(conn, "req_1", amount, transfer_id="r", reason="", now_ns=T0)  # type: ignore[arg-type]

    asyncio.run(run())


def test_credit_is_adjusted_both_ways_and_never_below_zero(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            made = await billed(conn)

            async def change(amount: int, transfer_id: str, corrects_id: str = "") -> None:
                how: dict[str, Any] = {"transfer_id": transfer_id, "reason": "typo", "corrects_id": corrects_id}
                await adjust(conn, made.tenant_id, amount, **how, now_ns=T0)

            for _ in range(2):  # a repeat moves nothing
                await change(-900, "a1", "first")
            assert await balance(conn, made.tenant_id) == Balance(40, 0, 60)
            with pytest.raises(CorrectionError, match="41 nano-units cannot be taken: the credit is 40"):
                await change(-41, "a2")
            with pytest.raises(CorrectionError, match="nothing_such"):
                await change(5, "a3", "nothing_such")
            for amount, corrects_id in ((900, "first"), (-900, ""), (-899, "first")):
                with pytest.raises(LedgerConflictError, match="a1"):
                    await change(amount, "a1", corrects_id)
            await change(5, "a4")
            assert await balance(conn, made.tenant_id) == Balance(45, 0, 60)
            assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_many_refunds_at_once_give_back_no_more_than_was_charged(postgres_url: str) -> None:
    async def run() -> None:
        async with opened(postgres_url) as database:
            async with database.transaction() as conn:
                made = await billed(conn, charged=60)

            async def one(number: int) -> int:
                try:
                    async with database.transaction() as conn:
                        await give_back(conn, 25, f"r{number}")
                except CorrectionError:
                    return 0
                return 25

            assert sum(await asyncio.gather(*(one(number) for number in range(12)))) == 50
            async with database.read() as conn:
                assert await balance(conn, made.tenant_id) == Balance(990, 0, 10)
                assert (await check_ledger(conn)).ok

    asyncio.run(run())
