"""One balanced transaction on a tenant's accounts: the only code that writes ledger rows and moves balances.

What a transaction means is ledger.py's and credit.py's part; that it sums to zero, and that nothing is overdrawn, is
asserted here.
"""

from collections.abc import Mapping
from typing import Final

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.money import BIGINT_MAX, MoneyRangeError

CURRENCY: Final = "USD"
ACCOUNT_KINDS: Final = ("credit", "funding", "held", "revenue")


class UnknownAccountError(LookupError):
    """The tenant has no accounts: there is no such tenant, or open_accounts was never called."""


async def post(
    conn: AsyncConnection,
    tenant_id: str,
    balances: Mapping[str, int],
    changes: Mapping[str, int],
    transaction_id: str,
    kind: str,
    now_ns: int,
    *,
    hold_id: str | None = None,
    memo: str = "",
    corrects_id: str | None = None,
) -> dict[str, int]:
    """Append one transaction and move the balances, which are returned as they are after it.

    The caller holds the account locks; `balances` is what it read under them. Raises MoneyRangeError.
    """
    assert sum(changes.values()) == 0, f"unbalanced {kind} {transaction_id}: {dict(changes)}"
    after = {account_kind: balances[account_kind] + changes.get(account_kind, 0) for account_kind in balances}
    if any(abs(amount) > BIGINT_MAX for amount in after.values()):
        raise MoneyRangeError(f"{kind} {transaction_id} would take a balance beyond {BIGINT_MAX}")
    assert after["credit"] >= 0, f"{kind} {transaction_id} would overdraw the credit of {tenant_id}"
    assert after["held"] >= 0, f"{kind} {transaction_id} would overdraw what {tenant_id} has held"
    await conn.execute(
        insert(tables.ledger_transaction).values(
            id=transaction_id,
            tenant_id=tenant_id,
            kind=kind,
            hold_id=hold_id,
            memo=memo,
            created_ns=now_ns,
            corrects_id=corrects_id,
        )
    )
    lines = [
        {
            "transaction_id": transaction_id,
            "line": line,
            "account_id": account_id(tenant_id, name),
            "amount_nano_usd": amount,
        }
        for line, (name, amount) in enumerate(changes.items())
    ]
    await conn.execute(insert(tables.ledger_entry).values(lines))
    for name in sorted(changes):
        await conn.execute(
            update(tables.account)
            .where(tables.account.c.id == account_id(tenant_id, name))
            .values(balance_nano_usd=after[name])
        )
    return after


async def lock_accounts(conn: AsyncConnection, tenant_id: str) -> dict[str, int]:
    return await read_accounts(conn, tenant_id, lock=True)


async def read_accounts(conn: AsyncConnection, tenant_id: str, *, lock: bool) -> dict[str, int]:
    ids = [account_id(tenant_id, kind) for kind in ACCOUNT_KINDS]
    table = tables.account
    query = select(table.c.kind, table.c.balance_nano_usd).where(table.c.id.in_(ids)).order_by(table.c.id)
    rows = await conn.execute(query.with_for_update() if lock else query)
    balances = {row.kind: row.balance_nano_usd for row in rows}
    if len(balances) != len(ACCOUNT_KINDS):
        raise UnknownAccountError(f"tenant {tenant_id!r} has no accounts")
    return balances


def account_id(tenant_id: str, kind: str) -> str:
    return f"{tenant_id}:{kind}:{CURRENCY}"
