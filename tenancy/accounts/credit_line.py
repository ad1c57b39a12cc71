"""Post-paid tenants: a credit line, so that holds are placed on money that has yet to be billed, up to a limit.

A tenant is pre-paid until it has a limit above zero. Its line is one more credit, the last that is used, and has four
more accounts; what admits a request is the same hold on the same account `credit` as of everybody, so a post-paid
tenant is never one token over its limit for the same reason as a pre-paid one is never one over its credit.

    limit           line -x         credit +x                                   the limit is raised by x (or lowered)
    invoiced        receivable -d   line +u   funding +p   tax +t   rounding    an invoice is issued: d is due
    payment         funding -e      receivable +e    line -v   credit +v        e of it was paid
    invoice_voided                                                              the opposite of its `invoiced`

    u   what the invoice's requests took of the line, less refunds
    p   what they took of paid credit, where the buyer's terms are that it was on account (parties.py)
    t   tax; rounding: d is in minor units, u and p are exact
    v   u in proportion: after payments of e1, e2... the line has back u * (e1 + e2...) / d, rounded down; at the end u

    line         minus the limit, but for what is billed and not paid
    receivable   minus what is billed and not paid: the sum of what is open over issued documents
    drawn        limit - left = what was used of the line and not paid, billed or not
    drawn + held of the line <= limit                                           always

Tax and rounding count in what is due, not against the limit. A credit note is the same with the signs turned; one that
is paid out takes back the room that its refund made, so it is refused while that room is in use.
"""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.accounts import credits
from tenancy.accounts.credits import line_id
from tenancy.accounts.posting import LINE_KINDS, currency_of, lock_accounts, lock_all_accounts, open_accounts, post
from tenancy.money import require_amount, require_int


class CreditLineError(ValueError):
    """The limit cannot be lowered so far, or a payment not be paid out; the message says how far."""


@dataclass(frozen=True, slots=True)
class CreditLine:
    """Of a post-paid tenant. `drawn` is limit - left: used and not paid yet, but for what was paid too much."""

    tenant_id: str
    limit_nano_usd: int
    left_nano_usd: int  # not used; requests in flight hold part of it
    receivable_nano_usd: int  # billed and not paid, tax included

    @property
    def drawn_nano_usd(self) -> int:
        return self.limit_nano_usd - self.left_nano_usd


@dataclass(frozen=True, slots=True)
class Due:
    """What an invoice makes due, in nano-units: see the table above."""

    due_nano: int
    line_nano: int
    paid_credit_nano: int
    tax_nano: int


async def set_limit(
    conn: AsyncConnection, tenant_id: str, limit_nano_usd: int, *, transfer_id: str, now_ns: int, memo: str = ""
) -> CreditLine | None:
    """Make a tenant post-paid, change its limit, or, with 0, make it pre-paid again. None: the limit was that already.

    Raises CreditLineError for less than is used and held, UnknownAccountError, MoneyRangeError.
    """
    require_amount(limit_nano_usd, "limit_nano_usd")
    require_int(now_ns, "now_ns")
    await lock_accounts(conn, tenant_id)  # first: nobody else opens the line meanwhile
    before = await get_line(conn, tenant_id)
    if limit_nano_usd == (0 if before is None else before.limit_nano_usd):
        return None
    currency = await currency_of(conn, tenant_id)
    await open_accounts(conn, tenant_id, now_ns=now_ns, currency=currency, kinds=LINE_KINDS)
    if before is None:
        await credits.require_addable(conn, tenant_id, "paid", None, now_ns)
        await conn.execute(
            insert(_CREDIT).values(
                id=line_id(tenant_id),
                tenant_id=tenant_id,
                kind="line",
                amount_nano_usd=0,
                left_nano_usd=0,
                expires_ns=None,
                created_ns=now_ns,
            )
        )
        before = CreditLine(tenant_id, 0, 0, 0)
    change = limit_nano_usd - before.limit_nano_usd
    balances = await lock_all_accounts(conn, tenant_id)
    room = min(balances["credit"], before.left_nano_usd)
    if change < -room:
        lowest = before.limit_nano_usd - room
        raise CreditLineError(f"{lowest} of the line are used or held: the limit cannot be lower now, or suspend it")
    await post(conn, tenant_id, balances, {"line": -change, "credit": change}, transfer_id, "limit", now_ns, memo=memo)
    await conn.execute(
        update(_CREDIT)
        .where(_CREDIT.c.id == line_id(tenant_id))
        .values(amount_nano_usd=limit_nano_usd, left_nano_usd=before.left_nano_usd + change)
    )
    return await get_line(conn, tenant_id)


async def get_line(conn: AsyncConnection, tenant_id: str) -> CreditLine | None:
    """None: the tenant is, and always was, pre-paid."""
    account = tables.account
    row = (
        await conn.execute(
            select(_CREDIT.c.amount_nano_usd, _CREDIT.c.left_nano_usd, account.c.balance_nano_usd)
            .join(account, (account.c.tenant_id == _CREDIT.c.tenant_id) & (account.c.kind == "receivable"))
            .where(_CREDIT.c.id == line_id(tenant_id))
        )
    ).first()
    return None if row is None else CreditLine(tenant_id, row[0], row[1], -row[2])


async def invoiced(conn: AsyncConnection, tenant_id: str, invoice_id: str, due: Due, now_ns: int) -> None:
    """Post what an invoice that is issued in this transaction makes due; nothing for a tenant without a line."""
    if await get_line(conn, tenant_id) is None:
        return
    changes = {
        "receivable": -due.due_nano,
        "line": due.line_nano,
        "funding": due.paid_credit_nano,
        "tax": due.tax_nano,
        "rounding": due.due_nano - due.line_nano - due.paid_credit_nano - due.tax_nano,
    }
    changes = {kind: nano for kind, nano in changes.items() if nano}
    if changes:
        balances = await lock_all_accounts(conn, tenant_id)
        await post(conn, tenant_id, balances, changes, _issued(invoice_id), "invoiced", now_ns)


async def paid(
    conn: AsyncConnection,
    tenant_id: str,
    invoice_id: str,
    amount_nano: int,
    *,
    payment_id: str,
    reference: str,
    now_ns: int,
) -> None:
    """Post that so much of an invoice was paid: that part of what it had drawn of the line can be used again.

    Nothing for an invoice that was issued to a tenant without a line. Raises CreditLineError.
    """
    entries = await _entries(conn, _issued(invoice_id))
    if not entries:
        return
    balances = await lock_all_accounts(conn, tenant_id)
    due, drawn, before = -entries.get("receivable", 0), entries.get("line", 0), await _paid_nano(conn, invoice_id)
    after = before + amount_nano
    assert 0 <= before * due <= after * due <= due * due, f"{payment_id} is not within what is open of {invoice_id}"
    freed = _share(drawn, after, due) - (_share(drawn, before, due) if before else 0)
    line = await get_line(conn, tenant_id)
    assert line is not None, f"{invoice_id} was invoiced to {tenant_id}, which has no line"
    room = min(balances["credit"], line.left_nano_usd)
    if freed < -room:
        raise CreditLineError(
            f"{invoice_id} cannot be paid out: {-freed} nano-units of the line came back with it and {room} are free"
        )
    changes = {"funding": -amount_nano, "receivable": amount_nano, "line": -freed, "credit": freed}
    changes = {kind: nano for kind, nano in changes.items() if nano}
    if not changes:
        return
    await post(
        conn,
        tenant_id,
        balances,
        changes,
        payment_id,
        "payment",
        now_ns,
        memo=reference,
        corrects_id=_issued(invoice_id),
    )
    if freed:
        await credits.use(conn, line_id(tenant_id), payment_id, -freed)


async def voided(conn: AsyncConnection, tenant_id: str, invoice_id: str, reason: str, now_ns: int) -> None:
    """Post that an issued invoice is void: what it made due is not due."""
    entries = await _entries(conn, _issued(invoice_id))
    if not entries:
        return
    balances = await lock_all_accounts(conn, tenant_id)
    await post(
        conn,
        tenant_id,
        balances,
        {kind: -nano for kind, nano in entries.items()},
        f"{invoice_id}:void",
        "invoice_voided",
        now_ns,
        memo=reason,
        corrects_id=_issued(invoice_id),
    )


def _issued(invoice_id: str) -> str:
    return f"{invoice_id}:issued"


def _share(drawn: int, paid_nano: int, due_nano: int) -> int:
    """What comes back of `drawn` when so much of what was due is paid: rounded down, so never too early."""
    return drawn if paid_nano == due_nano else drawn * paid_nano // due_nano


async def _paid_nano(conn: AsyncConnection, invoice_id: str) -> int:
    """What the ledger says was paid of an invoice."""
    entry, account, transaction = tables.ledger_entry, tables.account, tables.ledger_transaction
    query = (
        select(func.coalesce(func.sum(entry.c.amount_nano_usd), 0))
        .join(account, account.c.id == entry.c.account_id)
        .join(transaction, transaction.c.id == entry.c.transaction_id)
        .where(
            transaction.c.corrects_id == _issued(invoice_id),
            transaction.c.kind == "payment",
            account.c.kind == "receivable",
        )
    )
    return int(await conn.scalar(query) or 0)


async def _entries(conn: AsyncConnection, transaction_id: str) -> dict[str, int]:
    """By account kind."""
    entry, account = tables.ledger_entry, tables.account
    query = (
        select(account.c.kind, entry.c.amount_nano_usd)
        .join(account, account.c.id == entry.c.account_id)
        .where(entry.c.transaction_id == transaction_id)
    )
    return {kind: int(nano) for kind, nano in await conn.execute(query)}


_CREDIT: Final = tables.credit
