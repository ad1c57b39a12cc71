"""One balanced transaction on a tenant's accounts: the only code that writes ledger rows and moves balances.

What a transaction means is the part of ledger.py, credits.py and credit_line.py; that it sums to zero, in one currency,
and that nothing is overdrawn, is asserted here.

A tenant's accounts have one currency, chosen when they are opened: an index refuses a second account of a kind, and
`post` writes to the accounts whose balances it is given, so no entry can name another currency.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import BindParameter, Select, Update, bindparam, case, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.money import BIGINT_MAX, MoneyRangeError

CURRENCY: Final = "USD"  # of a tenant that was created without saying
ACCOUNT_KINDS: Final = ("credit", "funding", "held", "revenue")
LINE_KINDS: Final = ("line", "receivable", "rounding", "tax")  # post-paid tenants have these too: credit_line.py


class UnknownAccountError(LookupError):
    """The tenant has no accounts: there is no such tenant, or open_accounts was never called."""


class CurrencyError(ValueError):
    """Not a currency, or not the account's."""


class Balances(dict[str, int]):
    """What was read of a tenant's accounts, by kind, and the currency that they all have."""

    def __init__(self, amounts: Mapping[str, int], currency: str) -> None:
        super().__init__(amounts)
        self.currency = currency


async def post(
    conn: AsyncConnection,
    tenant_id: str,
    balances: Balances,
    changes: Mapping[str, int],
    transaction_id: str,
    kind: str,
    now_ns: int,
    *,
    hold_id: str | None = None,
    memo: str = "",
    corrects_id: str | None = None,
) -> Balances:
    """Append one transaction and move the balances, which are returned as they are after it.

    The caller holds the account locks; `balances` is what it read under them. Raises MoneyRangeError.
    """
    assert sum(changes.values()) == 0, f"unbalanced {kind} {transaction_id}: {dict(changes)}"
    currency = balances.currency
    after = Balances({one: nano + changes.get(one, 0) for one, nano in balances.items()}, currency)
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
            "account_id": account_id(tenant_id, name, currency),
            "amount_nano_usd": amount,
        }
        for line, (name, amount) in enumerate(changes.items())
    ]
    await conn.execute(_ENTRIES, lines)
    moved = {
        f"{part}_{place}": value
        for place, name in enumerate(sorted(changes))
        for part, value in (("id", account_id(tenant_id, name, currency)), ("balance", after[name]))
    }
    await conn.execute(_MOVES[len(changes)], moved)
    return after


async def open_accounts(
    conn: AsyncConnection,
    tenant_id: str,
    *,
    now_ns: int,
    currency: str = CURRENCY,
    kinds: Sequence[str] = ACCOUNT_KINDS,
) -> None:
    """Open a tenant's accounts; opening twice does nothing. Their currency stays what it is.

    Raises CurrencyError, also where they are open in another one.
    """
    dialect = postgresql if conn.dialect.name == "postgresql" else sqlite
    rows = [
        {
            "id": account_id(tenant_id, kind, require_currency(currency)),
            "tenant_id": tenant_id,
            "kind": kind,
            "currency": currency,
            "balance_nano_usd": 0,
            "created_ns": now_ns,
        }
        for kind in kinds
    ]
    await conn.execute(dialect.insert(tables.account).on_conflict_do_nothing(), rows)
    there = await read_accounts(conn, tenant_id, lock=False)
    if there.currency != currency:
        raise CurrencyError(f"the accounts of {tenant_id} are in {there.currency}: they cannot be opened in {currency}")


async def lock_accounts(conn: AsyncConnection, tenant_id: str) -> Balances:
    return await read_accounts(conn, tenant_id, lock=True)


async def read_accounts(conn: AsyncConnection, tenant_id: str, *, lock: bool) -> Balances:
    """The four accounts that every tenant has. Raises UnknownAccountError."""
    found = _balances(await conn.execute(_LOCKED if lock else _READ, {"of": tenant_id}), tenant_id)
    if len(found) != len(ACCOUNT_KINDS):
        raise UnknownAccountError(f"tenant {tenant_id!r} has no accounts")
    return found


async def lock_all_accounts(conn: AsyncConnection, tenant_id: str) -> Balances:
    """Those of a credit line too, where it has one. Raises UnknownAccountError."""
    found = _balances(await conn.execute(_ALL_LOCKED, {"of": tenant_id}), tenant_id)
    if not found.keys() >= set(ACCOUNT_KINDS):
        raise UnknownAccountError(f"tenant {tenant_id!r} has no accounts")
    return found


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


def require_currency(text: str) -> str:
    """An ISO 4217 code as it is written: three capital letters. Raises CurrencyError."""
    if len(text) != 3 or not text.isascii() or not text.isalpha() or not text.isupper():
        raise CurrencyError(f"a currency is an ISO 4217 code of three capital letters, such as EUR, not {text!r}")
    return text


def account_id(tenant_id: str, kind: str, currency: str) -> str:
    return f"{tenant_id}:{kind}:{currency}"


def _balances(rows: Iterable[Any], tenant_id: str) -> Balances:
    found, currencies = {}, set()
    for row in rows:
        found[row.kind] = row.balance_nano_usd
        currencies.add(row.currency)
    assert len(currencies) < 2, f"the accounts of {tenant_id} have several currencies: {sorted(currencies)}"
    return Balances(found, currencies.pop() if currencies else "")


# Built once: a statement that is built for each request costs as much as sending it.
_TRANSACTION: Final = insert(tables.ledger_transaction)
_ENTRIES: Final = insert(tables.ledger_entry)


def _reading(kinds: Sequence[str]) -> Select[tuple[str, int, str]]:
    """In id order, in which everybody locks them."""
    table = tables.account
    mine = table.c.tenant_id == bindparam("of"), table.c.kind.in_(kinds)
    return select(table.c.kind, table.c.balance_nano_usd, table.c.currency).where(*mine).order_by(table.c.id)


def _moving(num_accounts: int) -> Update:
    """One statement for all of a transaction's accounts, whose rows are locked already."""
    table = tables.account
    ids: list[BindParameter[str]] = [bindparam(f"id_{place}") for place in range(num_accounts)]
    balances = [bindparam(f"balance_{place}", type_=table.c.balance_nano_usd.type) for place in range(num_accounts)]
    balance = case(*((table.c.id == id_, new) for id_, new in zip(ids, balances, strict=True)))
    return update(table).where(table.c.id.in_(ids)).values(balance_nano_usd=balance)


_READ: Final = _reading(ACCOUNT_KINDS)
_LOCKED: Final = _READ.with_for_update()
_ALL_LOCKED: Final = _reading((*ACCOUNT_KINDS, *LINE_KINDS)).with_for_update()
_MOVES: Final = {number: _moving(number) for number in range(1, len((*ACCOUNT_KINDS, *LINE_KINDS)) + 1)}
