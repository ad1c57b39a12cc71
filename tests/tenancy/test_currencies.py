"""A tenant's currency is chosen once, and nothing in another one ever enters its books."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from tenancy import tables
from tenancy.access.directory import create_organisation, create_tenant
from tenancy.accounts.credit_line import set_limit
from tenancy.accounts.ledger import Hold, balance, capture, grant_credit, place_hold
from tenancy.accounts.ledger_check import check_ledger
from tenancy.accounts.posting import (
    Balances,
    CurrencyError,
    account_id,
    currency_of,
    lock_accounts,
    open_accounts,
    post,
    require_currency,
)
from tenancy.pricing.price_book import add_price, price_at
from tenancy.pricing.prices import PriceMissingError
from tests.tenancy.conftest import opened
from tests.tenancy.world import SECOND, T0, counting_entropy, populate


async def euro_tenant(conn: Any, entropy: Any) -> str:
    organisation = await create_organisation(conn, "euro group", entropy=entropy, now_ns=T0)
    made = await create_tenant(conn, organisation.organisation_id, "euro", entropy=entropy, now_ns=T0, currency="EUR")
    return made.tenant_id


async def place(conn: Any, tenant_id: str, price_id: str, hold_id: str = "hold_1") -> Hold:
    hold = await place_hold(
        conn,
        hold_id=hold_id,
        tenant_id=tenant_id,
        request_id=f"req_{hold_id}",
        price_id=price_id,
        amount_nano_usd=60,
        expires_ns=T0 + 60 * SECOND,
        now_ns=T0,
    )
    assert isinstance(hold, Hold)
    return hold


def test_all_of_a_request_is_in_its_accounts_currency(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            dollars = await populate(conn, entropy=entropy)  # and with it a price of "m" in USD
            tenant_id = await euro_tenant(conn, entropy)
            assert await currency_of(conn, tenant_id) == "EUR"
            with pytest.raises(PriceMissingError):
                await price_at(conn, "m", T0, tenant_id=tenant_id)
            price = await add_price(
                conn,
                model="m",
                input_pico_usd=1,
                cached_input_pico_usd=1,
                output_pico_usd=1,
                currency="EUR",
                effective_from_ns=T0,
                entropy=entropy,
                now_ns=T0,
            )
            assert await price_at(conn, "m", T0, tenant_id=tenant_id) == price
            assert (await price_at(conn, "m", T0, tenant_id=dollars.tenant_id)).currency == "USD"
            await grant_credit(conn, tenant_id, 100, transfer_id="grant", now_ns=T0)
            await set_limit(conn, tenant_id, 50, transfer_id="limit", now_ns=T0)
            await place(conn, tenant_id, price.price_id)
            await capture(conn, "hold_1", 40, T0 + 1)
            assert (await balance(conn, tenant_id)).captured_nano_usd == 40
            accounts, entries = tables.account, tables.ledger_entry
            used = await conn.scalars(
                select(accounts.c.currency).join(entries, entries.c.account_id == accounts.c.id).distinct()
            )
            assert list(used) == ["EUR"]
            assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_the_currency_stays(database_url: str) -> None:
    """Accounts cannot be opened again in another one, by our code or around it."""

    async def run() -> None:
        async with opened(database_url) as database:
            async with database.transaction() as conn:
                tenant_id = await euro_tenant(conn, counting_entropy())
                await open_accounts(conn, tenant_id, now_ns=T0 + 1, currency="EUR")
                with pytest.raises(CurrencyError, match="are in EUR"):
                    await open_accounts(conn, tenant_id, now_ns=T0 + 1)
            for kind in ("credit", "held", "funding", "revenue"):
                second = {
                    "id": account_id(tenant_id, kind, "USD"),
                    "tenant_id": tenant_id,
                    "kind": kind,
                    "currency": "USD",
                    "balance_nano_usd": 0,
                    "created_ns": T0,
                }
                with pytest.raises(IntegrityError):
                    async with database.transaction() as conn:
                        await conn.execute(insert(tables.account).values(second))

    asyncio.run(run())


def test_mixed_books_are_found(sqlite_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(sqlite_url) as database:
            async with database.transaction() as conn:
                dollars = await populate(conn, entropy=entropy)
                tenant_id = await euro_tenant(conn, entropy)
                await grant_credit(conn, tenant_id, 100, transfer_id="grant", now_ns=T0)
            async with database.transaction() as conn:  # a hold at a price in USD
                await place(conn, tenant_id, dollars.price_id)
                assert (await check_ledger(conn)).wrong_currency == ["hold_1"]
                await conn.rollback()
            async with database.transaction() as conn:  # an account that changes its currency
                held = tables.account.c.kind == "funding"
                await conn.execute(update(tables.account).where(held).values(currency="USD"))
                assert (await check_ledger(conn)).wrong_currency == ["grant"]
                with pytest.raises(AssertionError, match="several currencies"):
                    await lock_accounts(conn, tenant_id)
                await conn.rollback()
            async with database.transaction() as conn:  # entries on another tenant's accounts
                theirs = Balances(await lock_accounts(conn, dollars.tenant_id), "USD")
                await post(conn, dollars.tenant_id, theirs, {"credit": 5, "funding": -5}, "good", "grant", T0)
                row = tables.ledger_transaction
                await conn.execute(
                    insert(row).values(id="bad", tenant_id=tenant_id, kind="grant", memo="", created_ns=T0)
                )
                lines = [("credit", 5), ("funding", -5)]
                for line, (kind, nano) in enumerate(lines):
                    entry = {"transaction_id": "bad", "line": line, "amount_nano_usd": nano}
                    account = account_id(dollars.tenant_id, kind, "USD")
                    await conn.execute(insert(tables.ledger_entry).values(**entry, account_id=account))
                assert (await check_ledger(conn)).wrong_currency == ["bad"]
                await conn.rollback()

    asyncio.run(run())


@settings(max_examples=200)
@given(st.text(max_size=5))
def test_a_currency_is_three_capital_letters(text: str) -> None:
    good = len(text) == 3 and all("A" <= letter <= "Z" for letter in text)
    if good:
        assert require_currency(text) == text
    else:
        with pytest.raises(CurrencyError):
            require_currency(text)
