"""The ledger: append-only, double entry, two-phase holds. Amounts are nano-USD.

Every tenant has four accounts, and every transaction moves money between them so that its entries sum to zero:

    grant     funding -x    credit  +x                       money comes in
    hold      credit  -x    held    +x                       a request is admitted for its worst case x
    captured  held    -x    revenue +a    credit +(x - a)    it ended and cost a, 0 <= a <= x
    voided    held    -x    credit  +x                       it ended and costs nothing
    expired   held    -x    credit  +x                       nobody settled it in time
    refund, adjustment                                       set an earlier one right: corrections.py
    expiry    credit  -x    funding +x                       a credit ended with this much left: credits.py
    limit, invoiced, payment, invoice_voided                 of post-paid tenants: credit_line.py

    hold states:  pending -> captured | voided | expired     (the last three are terminal: exactly once)

credit and held never go below zero; funding is minus what came in. The house's figures (revenue, funding) are sums
over tenants: with one account row a tenant, two tenants' requests never wait for the same row.

Idempotent by id: a repeat with the same arguments returns the first result and moves nothing; with other arguments it
raises. The settling transaction's id is derived from the hold's, so the primary key alone refuses a second one.

Budgets (budget_use.py) are counted in the same transactions: place_hold refuses what a hard budget does not cover just
as it refuses what the credit does not.

Locks (PostgreSQL, READ COMMITTED; on SQLite there is one writer): first the hold row, by the conditional UPDATE that
changes its state, then the volume counter of a price with steps, then the tenant's account rows in id order, then
budget counters, which nobody touches without those.
place_hold takes the accounts first, but never waits for a hold row. A transaction touches one tenant.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, cast

from sqlalchemy import Select, bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.accounts import budget_use, credits
from tenancy.accounts.budget_use import BudgetAlert, BudgetUse, Spender
from tenancy.accounts.credits import CreditKind, ExpiredCredit
from tenancy.accounts.posting import Balances, find_transaction, lock_accounts, post, read_accounts
from tenancy.money import MoneyRangeError, require_amount, require_int
from tenancy.tables import ExactInteger

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
    num_tokens: int | None = None  # what counts against limits of tokens: reserved, and once settled what was used
    gateway_id: str | None = None  # whose worker's journal counts what it produced
    tier: str = "default"  # what its price is charged as
    expired: tuple[ExpiredCredit, ...] = field(default=(), compare=False)  # when it was placed; to be logged then

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
    """The hold was refused. `available_nano_usd` is what the tightest limiter has."""

    available_nano_usd: int
    needed_nano_usd: int
    limiters: tuple[Limiter, ...] = field(default=(), compare=False)
    expired: tuple[ExpiredCredit, ...] = field(default=(), compare=False)  # to be logged in this transaction


@dataclass(frozen=True, slots=True)
class Settled:
    """How a hold ended: captured + released = the amount that was held. A repeat has nothing to log."""

    hold_id: str
    tenant_id: str
    state: HoldState
    captured_nano_usd: int
    released_nano_usd: int
    settled_ns: int
    alerts: tuple[BudgetAlert, ...] = ()  # to be logged in this transaction
    expired: tuple[ExpiredCredit, ...] = ()  # the same


@dataclass(frozen=True, slots=True)
class Balance:
    credit_nano_usd: int  # free to spend
    held_nano_usd: int  # promised to requests in flight
    captured_nano_usd: int  # billed so far


async def grant_credit(
    conn: AsyncConnection,
    tenant_id: str,
    amount_nano_usd: int,
    *,
    transfer_id: str,
    now_ns: int,
    memo: str = "",
    kind: CreditKind = "paid",
    expires_ns: int | None = None,
) -> Balance:
    """Add prepaid credit; returns the balance now.

    Raises LedgerConflictError, UnknownAccountError, MoneyRangeError; ValueError for an end that is not in the future.
    """
    require_amount(amount_nano_usd, "amount_nano_usd", minimum=1)
    require_int(now_ns, "now_ns")
    balances = await lock_accounts(conn, tenant_id)
    earlier = await find_transaction(conn, transfer_id)
    if earlier is not None:
        if earlier != ("grant", tenant_id, memo, amount_nano_usd, kind, expires_ns):
            raise LedgerConflictError(f"transfer {transfer_id!r} was already made with other arguments")
        return _balance(balances)
    await credits.require_addable(conn, tenant_id, kind, expires_ns, now_ns)
    changes = {"funding": -amount_nano_usd, "credit": amount_nano_usd}
    after = await post(conn, tenant_id, balances, changes, transfer_id, "grant", now_ns, memo=memo)
    await credits.add_credit(conn, tenant_id, transfer_id, amount_nano_usd, kind, expires_ns, now_ns)
    return _balance(after)


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
    num_tokens: int | None = None,
    gateway_id: str | None = None,
    tier: str = "default",
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
        num_tokens=num_tokens,
        gateway_id=gateway_id,
        tier=tier,
    )
    earlier = await get_hold(conn, hold_id)
    if earlier is not None:
        if _asked(earlier) != _asked(made):
            raise LedgerConflictError(f"hold {hold_id!r} was already placed with other arguments")
        return earlier
    balances, expired = await credits.expire_due(conn, tenant_id, balances, now_ns)
    uses = await budget_use.open_counters(conn, made.spender, now_ns)
    limiters = (Limiter("credit", balances["credit"], balances["held"]), *(_limiter(u) for u in uses if u.budget.hard))
    available_nano_usd = max(0, min(limiter.available_nano_usd for limiter in limiters))
    if available_nano_usd < amount_nano_usd:
        return InsufficientCredit(available_nano_usd, amount_nano_usd, limiters, expired)
    await conn.execute(_NEW_HOLD, {name: getattr(made, made_as) for made_as, name in _HOLD_COLUMNS.items()})
    await budget_use.reserve(conn, uses, amount_nano_usd)
    changes = {"credit": -amount_nano_usd, "held": amount_nano_usd}
    await post(conn, tenant_id, balances, changes, f"{hold_id}:hold", "hold", now_ns, hold_id=hold_id)
    return replace(made, expired=expired)


async def capture(
    conn: AsyncConnection, hold_id: str, amount_nano_usd: int, now_ns: int, *, num_tokens: int = 0
) -> Settled:
    """Bill `amount_nano_usd` of a hold and give back the rest; `num_tokens` is what counts against limits of tokens.

    A hold that is past its expiry but not yet expired can still be captured. Raises HoldSettledError where it ended
    another way or with another amount, UnknownHoldError, and MoneyRangeError for more than was held.
    """
    require_amount(amount_nano_usd, "amount_nano_usd")
    return await _settle(conn, hold_id, "captured", amount_nano_usd, now_ns, num_tokens)


async def void(conn: AsyncConnection, hold_id: str, now_ns: int, *, num_tokens: int = 0) -> Settled:
    """Give the whole hold back; `num_tokens` count against limits of tokens all the same.

    Raises HoldSettledError or UnknownHoldError.
    """
    return await _settle(conn, hold_id, "voided", 0, now_ns, num_tokens)


async def expire(conn: AsyncConnection, hold_id: str, now_ns: int) -> Settled:
    """Give back the whole of a hold that nobody settled in time. Raises HoldSettledError or UnknownHoldError."""
    return await _settle(conn, hold_id, "expired", 0, now_ns, 0)


async def expire_credit(conn: AsyncConnection, tenant_id: str, now_ns: int) -> tuple[ExpiredCredit, ...]:
    """Take back what has expired of a tenant's credit and is not held; what is to be logged. A repeat finds nothing."""
    _, expired = await credits.expire_due(conn, tenant_id, await lock_accounts(conn, tenant_id), now_ns)
    return expired


async def due_holds(
    conn: AsyncConnection, now_ns: int, limit: int, *, gateway_id: str | None = None, others_ns: int | None = None
) -> list[Hold]:
    """Up to `limit` pending holds whose expires_ns <= now_ns, oldest first; settling them is the caller's part.

    With `gateway_id`, only that gateway's, those that name none, and others' whose expires_ns <= others_ns.
    """
    due = _HOLDS.where(_HOLD.c.state == "pending", _HOLD.c.expires_ns <= require_int(now_ns, "now_ns"))
    if gateway_id is not None:
        mine = _HOLD.c.gateway_id.is_(None) | (_HOLD.c.gateway_id == gateway_id)
        due = due.where(mine | (_HOLD.c.expires_ns <= require_int(others_ns, "others_ns")))
    rows = await conn.execute(due.order_by(_HOLD.c.expires_ns, _HOLD.c.id).limit(limit))
    return [Hold(*row) for row in rows]


async def claim_pending(conn: AsyncConnection, hold_id: str, *, wait: bool = False) -> bool:
    """Whether the hold is still pending and from now on ours to settle. Where another one is at it: False, or, with
    `wait`, what is so when that one has ended."""
    mine = select(_HOLD.c.id).where(_HOLD.c.id == hold_id, _HOLD.c.state == "pending")
    return await conn.scalar(mine.with_for_update(skip_locked=not wait)) is not None


async def get_hold(conn: AsyncConnection, hold_id: str) -> Hold | None:
    row = (await conn.execute(_ONE_HOLD, {"of": hold_id})).first()
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
    conn: AsyncConnection, hold_id: str, state: HoldState, captured_nano_usd: int, now_ns: int, num_tokens: int
) -> Settled:
    require_int(now_ns, "now_ns")
    # The conditional UPDATE is the lock and the decision in one: of two racing settlements it changes one row once.
    values = {"of": hold_id, "to": state, "captured": captured_nano_usd, "at_ns": now_ns, "tokens": num_tokens}
    row = (await conn.execute(_CHANGED, values)).first()
    hold = await _require_hold(conn, hold_id) if row is None else Hold(*row)
    if row is None:
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
    transaction_id = f"{hold_id}:settle"
    after = await post(conn, hold.tenant_id, balances, changes, transaction_id, state, now_ns, hold_id=hold_id)
    if captured_nano_usd:
        await credits.take(conn, hold.tenant_id, transaction_id, captured_nano_usd, now_ns)
    _, expired = await credits.expire_due(conn, hold.tenant_id, after, now_ns)
    alerts = await budget_use.settle(conn, hold.spender, hold.created_ns, hold.amount_nano_usd, captured_nano_usd)
    return replace(_settled(hold), alerts=alerts, expired=expired)


def _limiter(use: BudgetUse) -> Limiter:
    return Limiter(use.budget.name, use.left_nano_usd, use.held_nano_usd, use.period_end_ns)


async def _require_hold(conn: AsyncConnection, hold_id: str) -> Hold:
    hold = await get_hold(conn, hold_id)
    if hold is None:
        raise UnknownHoldError(f"there is no hold {hold_id!r}")
    return hold


def _asked(hold: Hold) -> tuple[str, str, str, str, int, int]:
    return hold.tenant_id, hold.request_id, hold.price_id, hold.tier, hold.amount_nano_usd, hold.expires_ns


def _balance(balances: Balances) -> Balance:
    return Balance(balances["credit"], balances["held"], balances["revenue"])


def _settled(hold: Hold) -> Settled:
    captured = cast(int, hold.captured_nano_usd)
    released = hold.amount_nano_usd - captured
    return Settled(hold.hold_id, hold.tenant_id, hold.state, captured, released, cast(int, hold.settled_ns))


_HOLD: Final = tables.hold
# A Hold's fields and their columns, in the order of its constructor.
_HOLD_COLUMNS: Final = {one.name: one.name.removeprefix("hold_") for one in fields(Hold) if one.name != "expired"}
_HOLDS: Final[Select[Any]] = select(*(_HOLD.c[name] for name in _HOLD_COLUMNS.values()))
# Built once, as in posting.py.
_ONE_HOLD: Final = _HOLDS.where(_HOLD.c.id == bindparam("of"))
_NEW_HOLD: Final = insert(_HOLD)
_CHANGED: Final = (
    update(_HOLD)
    .where(
        _HOLD.c.id == bindparam("of"),
        _HOLD.c.state == "pending",
        _HOLD.c.amount_nano_usd >= bindparam("captured", type_=ExactInteger()),
    )
    .values(
        state=bindparam("to"),
        captured_nano_usd=bindparam("captured", type_=ExactInteger()),
        settled_ns=bindparam("at_ns"),
        num_tokens=bindparam("tokens"),
    )
    .returning(*(_HOLD.c[name] for name in _HOLD_COLUMNS.values()))
)
