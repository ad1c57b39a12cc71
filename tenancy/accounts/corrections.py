"""Corrections: the ledger is never changed, so what was wrong is set right by a new transaction that names the old one.

    refund       revenue -x    credit +x      gives back up to what a captured request cost, in total never more
    adjustment   funding -x    credit +x      more credit: a grant was too small, goodwill
                 credit  -x    funding +x     less credit, never below zero: a grant was too large, money paid out

What is given is paid credit without an end, also where the request had used promotional credit, but a refund first
gives a credit line back what the request drew from it; what is taken comes first from the credit that `corrects_id`
names, and never from a credit line, whose limit is another thing (credit_line.py). A refund does not give a budget
back: a budget counts what was charged.
Idempotent by the caller's transfer id, as grants are. Locks: the tenant's account rows only; a captured hold is
terminal.
"""

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.accounts import credits
from tenancy.accounts.ledger import Hold, LedgerConflictError, get_hold
from tenancy.accounts.posting import lock_accounts, post
from tenancy.money import require_amount, require_int


class CorrectionError(ValueError):
    """The correction would take more than there is, or corrects what does not exist; the message says which."""


async def captured_hold(conn: AsyncConnection, request_id: str) -> Hold:
    """The hold of a request that was billed. Raises CorrectionError."""
    hold_ids = await conn.scalars(
        select(tables.hold.c.id).where(tables.hold.c.request_id == request_id, tables.hold.c.state == "captured")
    )
    hold_id = hold_ids.first()
    hold = None if hold_id is None else await get_hold(conn, hold_id)
    if hold is None:
        raise CorrectionError(f"no request {request_id!r} was billed: nothing can be refunded")
    return hold


async def refund(
    conn: AsyncConnection, request_id: str, amount_nano_usd: int, *, transfer_id: str, reason: str, now_ns: int
) -> tuple[str, bool]:
    """Give back part of what a request cost; its tenant's id, and False for a repeat.

    Raises CorrectionError or LedgerConflictError.
    """
    require_amount(amount_nano_usd, "amount_nano_usd", minimum=1)
    require_int(now_ns, "now_ns")
    hold = await captured_hold(conn, request_id)
    tenant_id, corrects_id = hold.tenant_id, f"{hold.hold_id}:settle"
    balances = await lock_accounts(conn, tenant_id)
    if await _is_repeat(conn, transfer_id, ("refund", tenant_id, reason, corrects_id, amount_nano_usd)):
        return tenant_id, False
    left_nano_usd = await refundable_nano_usd(conn, hold)
    if amount_nano_usd > left_nano_usd:
        raise CorrectionError(f"of {request_id} {left_nano_usd} nano-units are left to refund, not {amount_nano_usd}")
    changes = {"revenue": -amount_nano_usd, "credit": amount_nano_usd}
    await post(conn, tenant_id, balances, changes, transfer_id, "refund", now_ns, memo=reason, corrects_id=corrects_id)
    await credits.give_back(conn, tenant_id, transfer_id, amount_nano_usd, now_ns, of=corrects_id)
    return tenant_id, True


async def adjust(
    conn: AsyncConnection,
    tenant_id: str,
    amount_nano_usd: int,
    *,
    transfer_id: str,
    reason: str,
    corrects_id: str = "",
    now_ns: int,
) -> bool:
    """Add credit, or take it where the amount is below zero; False for a repeat.

    `corrects_id`: the transaction that was wrong, if one was.

    Raises CorrectionError, LedgerConflictError or UnknownAccountError.
    """
    require_amount(abs(require_int(amount_nano_usd, "amount_nano_usd")), "amount_nano_usd", minimum=1)
    require_int(now_ns, "now_ns")
    balances = await lock_accounts(conn, tenant_id)
    if await _is_repeat(conn, transfer_id, ("adjustment", tenant_id, reason, corrects_id or None, amount_nano_usd)):
        return False
    if corrects_id:
        table = tables.ledger_transaction
        owner = await conn.scalar(select(table.c.tenant_id).where(table.c.id == corrects_id))
        if owner != tenant_id:
            raise CorrectionError(f"the tenant has no transaction {corrects_id!r} to correct")
    if amount_nano_usd < 0:
        own = [one for one in await credits.list_credits(conn, tenant_id, now_ns) if one.kind != "line"]
        free_nano_usd = min(balances["credit"], sum(one.left_nano_usd for one in own))
        if -amount_nano_usd > free_nano_usd:
            raise CorrectionError(f"{-amount_nano_usd} nano-units cannot be taken: the credit is {free_nano_usd}")
    changes = {"funding": -amount_nano_usd, "credit": amount_nano_usd}
    await post(
        conn,
        tenant_id,
        balances,
        changes,
        transfer_id,
        "adjustment",
        now_ns,
        memo=reason,
        corrects_id=corrects_id or None,
    )
    if amount_nano_usd > 0:
        await credits.give_back(conn, tenant_id, transfer_id, amount_nano_usd, now_ns)
    else:
        await credits.take(conn, tenant_id, transfer_id, -amount_nano_usd, now_ns, first=corrects_id)
    return True


async def refundable_nano_usd(conn: AsyncConnection, hold: Hold) -> int:
    """What a captured hold cost, less what was refunded of it."""
    transaction, entry, account = tables.ledger_transaction, tables.ledger_entry, tables.account
    refunded = await conn.scalar(
        select(func.coalesce(func.sum(entry.c.amount_nano_usd), 0))
        .join(transaction, transaction.c.id == entry.c.transaction_id)
        .join(account, account.c.id == entry.c.account_id)
        .where(
            transaction.c.corrects_id == f"{hold.hold_id}:settle",
            transaction.c.kind == "refund",
            account.c.kind == "credit",
        )
    )
    return (hold.captured_nano_usd or 0) - int(refunded or 0)


async def refunded_nano_usd(conn: AsyncConnection, tenant_id: str) -> int:
    """All that was refunded to a tenant: what its usage rows are above its revenue account."""
    transaction, entry, account = tables.ledger_transaction, tables.ledger_entry, tables.account
    total = await conn.scalar(
        select(func.coalesce(func.sum(entry.c.amount_nano_usd), 0))
        .join(transaction, transaction.c.id == entry.c.transaction_id)
        .join(account, account.c.id == entry.c.account_id)
        .where(
            transaction.c.tenant_id == tenant_id,
            transaction.c.kind == "refund",
            account.c.kind == "credit",
        )
    )
    return int(total or 0)


async def _is_repeat(conn: AsyncConnection, transfer_id: str, asked: tuple[str, str, str, str | None, int]) -> bool:
    """Whether this transfer was made before: (kind, tenant id, reason, what it corrects, change of the credit).

    Raises LedgerConflictError where it was made with other arguments.
    """
    table, entry = tables.ledger_transaction, tables.ledger_entry
    row = (
        await conn.execute(
            select(table.c.kind, table.c.tenant_id, table.c.memo, table.c.corrects_id, entry.c.amount_nano_usd)
            .join(entry, entry.c.transaction_id == table.c.id)
            .where(table.c.id == transfer_id, entry.c.account_id.like("%:credit:%"))
        )
    ).first()
    if row is not None and tuple(row) != asked:
        raise LedgerConflictError(f"transfer {transfer_id!r} was already made with other arguments")
    return row is not None
