"""The ledger: append-only, double entry, two-phase holds. Amounts are nano-USD.

Every tenant has four accounts, and every transaction moves money between them so that its entries sum to zero:

    grant     funding -x    credit  +x                       money comes in
    hold      credit  -x    held    +x                       a request is admitted for its worst case x
    captured  held    -x    revenue +a    credit +(x - a)    it ended and cost a, 0 <= a <= x
    voided    held    -x    credit  +x                       it ended and costs nothing
    expired   held    -x    credit  +x                       nobody settled it in time
    refund, adjustment                                       set an earlier one right: corrections.py

    hold states:  pending -> captured | voided | expired     (the last three are terminal: exactly once)

credit and held never go below zero; funding is minus what came in. The house's figures (revenue, funding) are sums
over tenants: with one account row a tenant, two tenants' requests never wait for the same row.

Idempotent by id: a repeat with the same arguments returns the first result and moves nothing; with other arguments it
raises. The settling transaction's id is derived from the hold's, so the primary key alone refuses a second one.

Budgets (budget_use.py) are counted in the same transactions: place_hold refuses what a hard budget does not cover just
as it refuses what the credit does not.

Locks (PostgreSQL, READ COMMITTED; on SQLite there is one writer): first the hold row, by the conditional UPDATE that
changes its state, then the tenant's account rows in id order, then budget counters, which nobody touches without those.
place_hold takes the accounts first, but never waits for a hold row. A transaction touches one tenant.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any, Final, Literal, cast

from sqlalchemy import Select, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import budget_use, tables
from tenancy.budget_use import BudgetAlert, BudgetUse, Spender
from tenancy.money import MoneyRangeError, require_amount, require_int
from tenancy.posting import ACCOUNT_KINDS, CURRENCY, account_id, lock_accounts, post, read_accounts

HoldState = Literal["pending", "captured", "voided", "expired"]


class LedgerConflictError(ValueError):
    """An id was used before with other arguments. Nothing was moved."""


class HoldSettledError(Exception):
    """The hold already ended another way; `hold` is how. Nothing was moved."""

    def __init__(self, hold: "Hold") -> None:
        super().__init__(f"hold {hold.hold_id} is already {hold.state} with {hold.captured_nano_usd} captured")
        self.hold = hold


class UnknownHoldError(LookupError):
    """There is no hold with this id."""


@dataclass(frozen=True, slots=True)
class Hold:
    hold_id: str
    tenant_id: str
    request_id: str
    price_id: str
    amount_nano_usd: int
    state: HoldState
    captured_nano_usd: int | None  # None while pending
    created_ns: int
    expires_ns: int
    settled_ns: int | None  # None while pending
    project_id: str | None = None
    key_id: str | None = None

    @property
    def spender(self) -> Spender:
        return Spender(self.tenant_id, self.project_id, self.key_id)


@dataclass(frozen=True, slots=True)
class Limiter:
    """What a hold must fit into: the credit, or a hard budget."""

    name: str  # "credit", or a budget's: "project-month"
    available_nano_usd: int  # below zero where a budget was lowered below its use
    held_nano_usd: int  # of requests in flight; part of it may come back
    ends_ns: int | None = None  # when a budget's period ends


@dataclass(frozen=True, slots=True)
class InsufficientCredit:
    """The hold was refused; nothing was moved. `available_nano_usd` is what the tightest limiter has."""

    available_nano_usd: int
    needed_nano_usd: int
    limiters: tuple[Limiter, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Settled:
    """How a hold ended: captured + released = the amount that was held. A repeat has no alerts."""

    hold_id: str
    tenant_id: str
    state: HoldState
    captured_nano_usd: int
    released_nano_usd: int
    settled_ns: int
    alerts: tuple[BudgetAlert, ...] = ()  # to be logged in this transaction


@dataclass(frozen=True, slots=True)
class Balance:
    credit_nano_usd: int  # free to spend
    held_nano_usd: int  # promised to requests in flight
    captured_nano_usd: int  # billed so far


async def open_accounts(conn: AsyncConnection, tenant_id: str, *, now_ns: int) -> None:
    """Open a tenant's four accounts; opening twice does nothing."""
    dialect = postgresql if conn.dialect.name == "postgresql" else sqlite
    rows = [
        {
            "id": account_id(tenant_id, kind),
            "tenant_id": tenant_id,
            "kind": kind,
            "currency": CURRENCY,
            "balance_nano_usd": 0,
            "created_ns": now_ns,
        }
        for kind in ACCOUNT_KINDS
    ]
    await conn.execute(dialect.insert(tables.account).on_conflict_do_nothing(index_elements=["id"]), rows)


async def grant_credit(
    conn: AsyncConnection, tenant_id: str, amount_nano_usd: int, *, transfer_id: str, now_ns: int, memo: str = ""
) -> Balance:
    """Add prepaid credit; returns the balance now. Raises LedgerConflictError, UnknownAccountError, MoneyRangeError."""
    require_amount(amount_nano_usd, "amount_nano_usd", minimum=1)
    require_int(now_ns, "now_ns")
    balances = await lock_accounts(conn, tenant_id)
    earlier = await _find_transaction(conn, transfer_id)
    if earlier is not None:
        if earlier != ("grant", tenant_id, memo, amount_nano_usd):
            raise LedgerConflictError(f"transfer {transfer_id!r} was already made with other arguments")
        return _balance(balances)
    changes = {"funding": -amount_nano_usd, "credit": amount_nano_usd}
    return _balance(await post(conn, tenant_id, balances, changes, transfer_id, "grant", now_ns, memo=memo))


async def place_hold(
    conn: AsyncConnection,
    *,
    hold_id: str,
    tenant_id: str,
    request_id: str,
    price_id: str,
    amount_nano_usd: int,
    expires_ns: int,
    now_ns: int,
    project_id: str | None = None,
    key_id: str | None = None,
) -> Hold | InsufficientCredit:
    """Move the worst case from credit to held, or refuse and move nothing. It counts in the budgets of `now_ns`.

    A repeat returns the hold as it is now, which may be settled already. Raises LedgerConflictError for a known id
    with another tenant, request, price, amount or expiry; UnknownAccountError; MoneyRangeError.
    """
    require_amount(amount_nano_usd, "amount_nano_usd")
    if require_int(expires_ns, "expires_ns") <= require_int(now_ns, "now_ns"):
        raise ValueError(f"expires_ns must be later than now ({now_ns}): {expires_ns}")
    balances = await lock_accounts(conn, tenant_id)
    made = Hold(
        hold_id=hold_id,
        tenant_id=tenant_id,
        request_id=request_id,
        price_id=price_id,
        amount_nano_usd=amount_nano_usd,
        state="pending",
        captured_nano_usd=None,
        created_ns=now_ns,
        expires_ns=expires_ns,
        settled_ns=None,
        project_id=project_id,
        key_id=key_id,
    )
    earlier = await get_hold(conn, hold_id)
    if earlier is not None:
        if _asked(earlier) != _asked(made):
            raise LedgerConflictError(f"hold {hold_id!r} was already placed with other arguments")
        return earlier
    uses = await budget_use.open_counters(conn, made.spender, now_ns)
    limiters = (Limiter("credit", balances["credit"], balances["held"]), *(_limiter(u) for u in uses if u.budget.hard))
    available_nano_usd = max(0, min(limiter.available_nano_usd for limiter in limiters))
    if available_nano_usd < amount_nano_usd:
        return InsufficientCredit(available_nano_usd, amount_nano_usd, limiters)
    await conn.execute(insert(_HOLD).values(dict(zip(_HOLD_COLUMNS, astuple(made), strict=True))))
    await budget_use.reserve(conn, uses, amount_nano_usd)
    changes = {"credit": -amount_nano_usd, "held": amount_nano_usd}
    await post(conn, tenant_id, balances, changes, f"{hold_id}:hold", "hold", now_ns, hold_id=hold_id)
    return made


async def capture(conn: AsyncConnection, hold_id: str, amount_nano_usd: int, now_ns: int) -> Settled:
    """Bill `amount_nano_usd` of a hold and give back the rest.

    A hold that is past its expiry but not yet expired can still be captured. Raises HoldSettledError where it ended
    another way or with another amount, UnknownHoldError, and MoneyRangeError for more than was held.
    """
    require_amount(amount_nano_usd, "amount_nano_usd")
    return await _settle(conn, hold_id, "captured", amount_nano_usd, now_ns)


async def void(conn: AsyncConnection, hold_id: str, now_ns: int) -> Settled:
    """Give the whole hold back. Raises HoldSettledError or UnknownHoldError."""
    return await _settle(conn, hold_id, "voided", 0, now_ns)


async def expire(conn: AsyncConnection, hold_id: str, now_ns: int) -> Settled:
    """Give back the whole of a hold that nobody settled in time. Raises HoldSettledError or UnknownHoldError."""
    return await _settle(conn, hold_id, "expired", 0, now_ns)


async def due_holds(conn: AsyncConnection, now_ns: int, limit: int) -> list[Hold]:
    """Up to `limit` pending holds whose expires_ns <= now_ns, oldest first; settling them is the caller's part."""
    rows = await conn.execute(
        _HOLDS.where(_HOLD.c.state == "pending", _HOLD.c.expires_ns <= require_int(now_ns, "now_ns"))
        .order_by(_HOLD.c.expires_ns, _HOLD.c.id)
        .limit(limit)
    )
    return [Hold(*row) for row in rows]


async def claim_pending(conn: AsyncConnection, hold_id: str) -> bool:
    """Whether the hold is still pending and from now on ours to settle; False also where another one is at it."""
    mine = select(_HOLD.c.id).where(_HOLD.c.id == hold_id, _HOLD.c.state == "pending")
    return await conn.scalar(mine.with_for_update(skip_locked=True)) is not None


async def get_hold(conn: AsyncConnection, hold_id: str) -> Hold | None:
    row = (await conn.execute(_HOLDS.where(_HOLD.c.id == hold_id))).first()
    return None if row is None else Hold(*row)


async def pending_holds(conn: AsyncConnection) -> list[Hold]:
    """Every hold that is not settled, the one that expires first at the front."""
    rows = await conn.execute(_HOLDS.where(_HOLD.c.state == "pending").order_by(_HOLD.c.expires_ns, _HOLD.c.id))
    return [Hold(*row) for row in rows]


async def balance(conn: AsyncConnection, tenant_id: str) -> Balance:
    """Raises UnknownAccountError."""
    return _balance(await read_accounts(conn, tenant_id, lock=False))


async def has_transaction(conn: AsyncConnection, transaction_id: str) -> bool:
    table = tables.ledger_transaction
    return await conn.scalar(select(table.c.id).where(table.c.id == transaction_id)) is not None


async def lock_balance(conn: AsyncConnection, tenant_id: str) -> Balance:
    """The balance, which nobody else moves before this transaction ends. Raises UnknownAccountError."""
    return _balance(await lock_accounts(conn, tenant_id))


async def _settle(
    conn: AsyncConnection, hold_id: str, state: HoldState, captured_nano_usd: int, now_ns: int
) -> Settled:
    require_int(now_ns, "now_ns")
    # The conditional UPDATE is the lock and the decision in one: of two racing settlements it changes one row once.
    changed = await conn.execute(
        update(_HOLD)
        .where(_HOLD.c.id == hold_id, _HOLD.c.state == "pending", _HOLD.c.amount_nano_usd >= captured_nano_usd)
        .values(state=state, captured_nano_usd=captured_nano_usd, settled_ns=now_ns)
    )
    hold = await _require_hold(conn, hold_id)
    if changed.rowcount == 0:
        if hold.state == "pending":
            raise MoneyRangeError(f"cannot capture {captured_nano_usd} of hold {hold_id}: it is {hold.amount_nano_usd}")
        if (hold.state, hold.captured_nano_usd) != (state, captured_nano_usd):
            raise HoldSettledError(hold)
        return _settled(hold)
    balances = await lock_accounts(conn, hold.tenant_id)
    released = hold.amount_nano_usd - captured_nano_usd
    changes = {"held": -hold.amount_nano_usd}
    if state == "captured":
        changes["revenue"] = captured_nano_usd
    if released or state != "captured":
        changes["credit"] = released
    await post(conn, hold.tenant_id, balances, changes, f"{hold_id}:settle", state, now_ns, hold_id=hold_id)
    alerts = await budget_use.settle(conn, hold.spender, hold.created_ns, hold.amount_nano_usd, captured_nano_usd)
    return replace(_settled(hold), alerts=alerts)


def _limiter(use: BudgetUse) -> Limiter:
    return Limiter(use.budget.name, use.left_nano_usd, use.held_nano_usd, use.period_end_ns)


async def _find_transaction(conn: AsyncConnection, transaction_id: str) -> tuple[str, str, str, int] | None:
    """(kind, tenant id, memo, credited amount) of a transaction, or None."""
    table, entry = tables.ledger_transaction, tables.ledger_entry
    row = (
        await conn.execute(
            select(table.c.kind, table.c.tenant_id, table.c.memo, entry.c.amount_nano_usd)
            .join(entry, entry.c.transaction_id == table.c.id)
            .where(table.c.id == transaction_id, entry.c.amount_nano_usd > 0)
        )
    ).first()
    return None if row is None else (row.kind, row.tenant_id, row.memo, row.amount_nano_usd)


async def _require_hold(conn: AsyncConnection, hold_id: str) -> Hold:
    hold = await get_hold(conn, hold_id)
    if hold is None:
        raise UnknownHoldError(f"there is no hold {hold_id!r}")
    return hold


def _asked(hold: Hold) -> tuple[str, str, str, int, int]:
    return hold.tenant_id, hold.request_id, hold.price_id, hold.amount_nano_usd, hold.expires_ns


def _balance(balances: Mapping[str, int]) -> Balance:
    return Balance(balances["credit"], balances["held"], balances["revenue"])


def _settled(hold: Hold) -> Settled:
    captured = cast(int, hold.captured_nano_usd)
    released = hold.amount_nano_usd - captured
    return Settled(hold.hold_id, hold.tenant_id, hold.state, captured, released, cast(int, hold.settled_ns))


_HOLD: Final = tables.hold
_HOLD_COLUMNS: Final = ("id", *(field_.name for field_ in fields(Hold)[1:]))  # as Hold has them
_HOLDS: Final[Select[Any]] = select(*(_HOLD.c[name] for name in _HOLD_COLUMNS))
