"""One balanced transaction on a tenant's accounts: the only code that writes ledger rows and moves balances.

What a transaction means is ledger.py's and credit.py's part; that it sums to zero, and that nothing is overdrawn, is
asserted here.
"""

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import BindParameter, Select, Update, bindparam, case, insert, select, update
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
    row = {
        "id": transaction_id,
        "tenant_id": tenant_id,
        "kind": kind,
        "hold_id": hold_id,
        "memo": memo,
        "created_ns": now_ns,
        "corrects_id": corrects_id,
    }
    await conn.execute(_TRANSACTION, row)
    lines = [
        {
            "transaction_id": transaction_id,
            "line": line,
            "account_id": account_id(tenant_id, name),
            "amount_nano_usd": amount,
        }
        for line, (name, amount) in enumerate(changes.items())
    ]
    await conn.execute(_ENTRIES, lines)
    moved = {
        f"{part}_{place}": value
        for place, name in enumerate(sorted(changes))
        for part, value in (("id", account_id(tenant_id, name)), ("balance", after[name]))
    }
    await conn.execute(_MOVES[len(changes)], moved)
    return after


async def lock_accounts(conn: AsyncConnection, tenant_id: str) -> dict[str, int]:
    return await read_accounts(conn, tenant_id, lock=True)


async def read_accounts(conn: AsyncConnection, tenant_id: str, *, lock: bool) -> dict[str, int]:
    ids = {f"id_{place}": account_id(tenant_id, kind) for place, kind in enumerate(ACCOUNT_KINDS)}
    rows = await conn.execute(_LOCKED if lock else _READ, ids)
    balances = {row.kind: row.balance_nano_usd for row in rows}
    if len(balances) != len(ACCOUNT_KINDS):
        raise UnknownAccountError(f"tenant {tenant_id!r} has no accounts")
    return balances


async def find_transaction(conn: AsyncConnection, transaction_id: str) -> tuple[Any, ...] | None:
    """(kind, tenant id, memo, credited amount; of a grant also its credit's kind and end) of a transaction, or None."""
    table, entry, of = tables.ledger_transaction, tables.ledger_entry, tables.credit
    row = (
        await conn.execute(
            select(table.c.kind, table.c.tenant_id, table.c.memo, entry.c.amount_nano_usd, of.c.kind, of.c.expires_ns)
            .join(entry, entry.c.transaction_id == table.c.id)
            .outerjoin(of, of.c.id == table.c.id)
            .where(table.c.id == transaction_id, entry.c.amount_nano_usd > 0)
        )
    ).first()
    # A grant from before there were credits (0006) is paid and has no end.
    return None if row is None else (*row[:4], row[4] or "paid", row[5])


async def currency_of(conn: AsyncConnection, tenant_id: str) -> str:
    """The currency of the tenant's accounts. Raises UnknownAccountError."""
    account = tables.account
    query = select(account.c.currency).where(account.c.tenant_id == tenant_id, account.c.kind == "credit")
    found: str | None = await conn.scalar(query)
    if found is None:
        raise UnknownAccountError(f"tenant {tenant_id!r} has no accounts")
    return found


def account_id(tenant_id: str, kind: str) -> str:
    return f"{tenant_id}:{kind}:{CURRENCY}"


# Built once: a statement that is built for each request costs as much as sending it.
_TRANSACTION: Final = insert(tables.ledger_transaction)
_ENTRIES: Final = insert(tables.ledger_entry)


def _reading() -> Select[tuple[str, int]]:
    table = tables.account
    ids: list[BindParameter[str]] = [bindparam(f"id_{place}") for place in range(len(ACCOUNT_KINDS))]
    return select(table.c.kind, table.c.balance_nano_usd).where(table.c.id.in_(ids)).order_by(table.c.id)


def _moving(num_accounts: int) -> Update:
    """One statement for all of a transaction's accounts, whose rows are locked already."""
    table = tables.account
    ids: list[BindParameter[str]] = [bindparam(f"id_{place}") for place in range(num_accounts)]
    balances = [bindparam(f"balance_{place}", type_=table.c.balance_nano_usd.type) for place in range(num_accounts)]
    balance = case(*((table.c.id == id_, new) for id_, new in zip(ids, balances, strict=True)))
    return update(table).where(table.c.id.in_(ids)).values(balance_nano_usd=balance)


_READ: Final = _reading()
_LOCKED: Final = _READ.with_for_update()
_MOVES: Final = {number: _moving(number) for number in range(1, len(ACCOUNT_KINDS) + 1)}
