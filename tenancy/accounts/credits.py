"""Credits: what a tenant's credit is made of. Each has a kind and may have an end; together they are all its money.

    left(credit) = amount - sum of its uses                          uses are rows that nobody changes
    sum of left over a tenant's credits = its accounts credit + held  (ledger.py)

What is billed is taken in this order: what has expired and is still there, promotional before paid before the credit
line of a post-paid tenant (credit_line.py), the earliest end first, the oldest first. Money is held from the whole, not
from one credit, and is taken when it is billed.

Expiry: [created, expires). After it, what is left goes back where it came from (`expiry`: credit -x, funding +x), but
for what is held at that moment: requests in flight may still need it, and the order above uses it first. When they
leave some of it, that expires in the transaction in which they are settled. So expiry never refuses what was admitted,
and nothing is admitted on credit that has expired: place_hold expires first.

What comes back (a refund, an adjustment) is paid credit without an end, in one credit a tenant, `TENANT:corrections`;
but a refund first gives a credit line back what the request had drawn from it.

Everything here needs the locks of the tenant's account rows.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from sqlalchemy import ColumnElement, bindparam, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.accounts.posting import Balances, post
from tenancy.money import require_int

CreditKind = Literal["promotional", "paid"]  # what can be granted
CREDIT_KINDS: Final[tuple[CreditKind, ...]] = get_args(CreditKind)
AnyKind = Literal["promotional", "paid", "line"]
ORDER: Final[tuple[AnyKind, ...]] = get_args(AnyKind)  # in which they are used
OPEN_MAX: Final = 1_000  # of a tenant: bounds what a settlement reads


class TooManyCreditsError(ValueError):
    """The tenant has as many credits with something left as it may have."""


@dataclass(frozen=True, slots=True)
class Credit:
    """`credit_id` is the transfer that granted it."""

    credit_id: str
    tenant_id: str
    kind: AnyKind
    amount_nano_usd: int
    left_nano_usd: int
    expires_ns: int | None  # None: it has no end
    created_ns: int


@dataclass(frozen=True, slots=True)
class ExpiredCredit:
    """What went back of a credit: whoever gets this writes it to the log, in this transaction."""

    credit_id: str
    tenant_id: str
    kind: AnyKind
    amount_nano_usd: int
    expires_ns: int


async def require_addable(
    conn: AsyncConnection, tenant_id: str, kind: CreditKind, expires_ns: int | None, now_ns: int
) -> None:
    """Before a grant is posted. Raises ValueError or TooManyCreditsError."""
    if kind not in CREDIT_KINDS:
        raise ValueError(f"a credit is {' or '.join(CREDIT_KINDS)}, not {kind!r}")
    if expires_ns is not None and require_int(expires_ns, "expires_ns") <= now_ns:
        raise ValueError(f"expires_ns must be later than now ({now_ns}): {expires_ns}")
    if len(await _open(conn, tenant_id)) >= OPEN_MAX:
        raise TooManyCreditsError(f"{tenant_id} has {OPEN_MAX} credits that are not used up: adjust one instead")


async def add_credit(
    conn: AsyncConnection,
    tenant_id: str,
    credit_id: str,
    amount_nano_usd: int,
    kind: CreditKind,
    expires_ns: int | None,
    now_ns: int,
) -> None:
    """The row of a grant that require_addable has passed and that was posted in this transaction."""
    await conn.execute(
        insert(_CREDIT).values(
            id=credit_id,
            tenant_id=tenant_id,
            kind=kind,
            amount_nano_usd=amount_nano_usd,
            left_nano_usd=amount_nano_usd,
            expires_ns=expires_ns,
            created_ns=now_ns,
        )
    )


async def take(
    conn: AsyncConnection, tenant_id: str, transaction_id: str, amount_nano_usd: int, now_ns: int, *, first: str = ""
) -> None:
    """Use credits up by what a posted transaction has taken; `first`: a credit that goes before all others."""
    order = sorted(await _open(conn, tenant_id), key=lambda one: (one.credit_id != first, *_order(one, now_ns)))
    missing = amount_nano_usd
    for credit in order:
        if missing == 0:
            return
        used = min(credit.left_nano_usd, missing)
        missing -= used
        await use(conn, credit.credit_id, transaction_id, used)
    assert missing == 0, f"{transaction_id} takes {missing} nano-USD more than the credits of {tenant_id} hold"


async def give_back(
    conn: AsyncConnection, tenant_id: str, transaction_id: str, amount_nano_usd: int, now_ns: int, *, of: str = ""
) -> None:
    """What a posted refund or adjustment gives: paid credit without an end.

    `of`: the transaction that is refunded; what that drew from a credit line goes back there first.
    """
    if of and (drawn := await _drawn(conn, line_id(tenant_id), of)) > 0:
        to_line = min(drawn, amount_nano_usd)
        await use(conn, line_id(tenant_id), transaction_id, -to_line)
        amount_nano_usd -= to_line
        if amount_nano_usd == 0:
            return
    dialect = postgresql if conn.dialect.name == "postgresql" else sqlite
    credit = Credit(corrections_id(tenant_id), tenant_id, "paid", 0, 0, None, now_ns)
    row = {
        "id": credit.credit_id,
        "tenant_id": tenant_id,
        "kind": credit.kind,
        "amount_nano_usd": 0,  # it has only what comes back: uses below zero
        "left_nano_usd": 0,
        "expires_ns": None,
        "created_ns": now_ns,
    }
    await conn.execute(dialect.insert(_CREDIT).on_conflict_do_nothing(index_elements=["id"]), [row])
    await use(conn, credit.credit_id, transaction_id, -amount_nano_usd)


async def expire_due(
    conn: AsyncConnection, tenant_id: str, balances: Balances, now_ns: int
) -> tuple[Balances, tuple[ExpiredCredit, ...]]:
    """Post the expiry of what has expired and is not held; the balances after it, and what is to be logged."""
    found = [Credit(*row) for row in await conn.execute(_DUE_CREDITS, {"of": tenant_id, "at_ns": now_ns})]
    due = sorted(found, key=lambda one: _order(one, now_ns))
    after = balances
    free = sum(credit.left_nano_usd for credit in due) - balances["held"]
    expired: list[ExpiredCredit] = []
    for credit in reversed(due):  # what is held is covered by those that are used first
        amount = min(credit.left_nano_usd, free)
        if amount <= 0:
            break
        free -= amount
        # What is left of an expired credit only shrinks, so this id is never used twice.
        digest = hashlib.sha256(credit.credit_id.encode()).hexdigest()[:32]
        transaction_id = f"expiry:{digest}:{credit.left_nano_usd}"
        changes = {"credit": -amount, "funding": amount}
        after = await post(
            conn, tenant_id, after, changes, transaction_id, "expiry", now_ns, corrects_id=credit.credit_id
        )
        await use(conn, credit.credit_id, transaction_id, amount)
        assert credit.expires_ns is not None
        expired.append(ExpiredCredit(credit.credit_id, tenant_id, credit.kind, amount, credit.expires_ns))
    return after, tuple(expired)


async def list_credits(conn: AsyncConnection, tenant_id: str, now_ns: int) -> list[Credit]:
    """A tenant's credits with something left, in the order in which they are used. Reads only."""
    return sorted(await _open(conn, tenant_id), key=lambda one: _order(one, now_ns))


async def tenants_with_due_credit(conn: AsyncConnection, now_ns: int, limit: int) -> list[str]:
    """Tenants that have expired credit which is not all held: expire_due would post something."""
    held = tables.account
    query = (
        select(_CREDIT.c.tenant_id)
        .join(held, (held.c.tenant_id == _CREDIT.c.tenant_id) & (held.c.kind == "held"))
        .where(_CREDIT.c.left_nano_usd > 0, _CREDIT.c.expires_ns <= now_ns)
        .group_by(_CREDIT.c.tenant_id, held.c.balance_nano_usd)
        .having(func.sum(_CREDIT.c.left_nano_usd) > held.c.balance_nano_usd)
        .order_by(_CREDIT.c.tenant_id)
        .limit(limit)
    )
    return list(await conn.scalars(query))


def corrections_id(tenant_id: str) -> str:
    return f"{tenant_id}:corrections"


def line_id(tenant_id: str) -> str:
    return f"{tenant_id}:line"


def _order(credit: Credit, now_ns: int) -> tuple[Any, ...]:
    endless = credit.expires_ns is None
    alive = endless or (credit.expires_ns or 0) > now_ns
    end = (endless, credit.expires_ns or 0)
    return (alive, ORDER.index(credit.kind), end, credit.created_ns, credit.credit_id)


async def _open(conn: AsyncConnection, tenant_id: str, *more: ColumnElement[bool]) -> list[Credit]:
    query = _OPEN_CREDITS.where(*more) if more else _OPEN_CREDITS
    return [Credit(*row) for row in await conn.execute(query, {"of": tenant_id})]


async def use(conn: AsyncConnection, credit_id: str, transaction_id: str, amount_nano_usd: int) -> None:
    """Take that much of one credit, or give it back where it is below zero, for a posted transaction."""
    # The caller holds the account locks, so what was read of the credit is still so.
    row = {"transaction_id": transaction_id, "credit_id": credit_id, "amount_nano_usd": amount_nano_usd}
    await conn.execute(_NEW_USE, row)
    await conn.execute(_LESS_LEFT, {"of": credit_id, "amount": amount_nano_usd})


async def _drawn(conn: AsyncConnection, credit_id: str, transaction_id: str) -> int:
    """What a transaction took of a credit and its refunds have not given back."""
    table, transaction = tables.credit_use, tables.ledger_transaction
    of = (transaction.c.id == transaction_id) | (transaction.c.corrects_id == transaction_id)
    total = await conn.scalar(
        select(func.coalesce(func.sum(table.c.amount_nano_usd), 0))
        .join(transaction, transaction.c.id == table.c.transaction_id)
        .where(of, table.c.credit_id == credit_id)
    )
    return int(total or 0)


_CREDIT: Final = tables.credit
_CREDITS: Final = select(
    _CREDIT.c.id,
    _CREDIT.c.tenant_id,
    _CREDIT.c.kind,
    _CREDIT.c.amount_nano_usd,
    _CREDIT.c.left_nano_usd,
    _CREDIT.c.expires_ns,
    _CREDIT.c.created_ns,
)
# Built once, as in posting.py.
_OPEN_CREDITS: Final = _CREDITS.where(_CREDIT.c.tenant_id == bindparam("of"), _CREDIT.c.left_nano_usd > 0)
_DUE_CREDITS: Final = _OPEN_CREDITS.where(_CREDIT.c.expires_ns <= bindparam("at_ns"))
_NEW_USE: Final = insert(tables.credit_use)
_LESS_LEFT: Final = (
    update(_CREDIT)
    .where(_CREDIT.c.id == bindparam("of"))
    .values(left_nano_usd=_CREDIT.c.left_nano_usd - bindparam("amount", type_=_CREDIT.c.left_nano_usd.type))
)
