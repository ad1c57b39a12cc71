"""An organisation's epoch: the name of the counters in the store that the database vouches for.

The same id stands in the store, beside the counters, and here. A store that was emptied, or that is another one, has
none or another: then nothing is admitted before its counters have been made anew from what the database knows.

The rule that makes it exact: who places a hold looks at the epoch after locking its tenant's accounts
(closing.require_active), and must find the one under which it was admitted. A rebuild changes the epoch while it holds
the accounts of all tenants of the organisation. So a hold is either seen by the rebuild and counted, or it is refused.

What is rebuilt, for each scope of the organisation:
    tokens of the day      what today's holds reserve (open) or used (settled), exactly
    leases                 one for each open hold
    debts of the minute    all that was admitted within the last minute, as if none had drained: never less than is owed
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import case, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.quotas import quota_tables

MINUTE_NS: Final = 60 * 10**9
DAY_NS: Final = 24 * 3_600 * 10**9
SKEW_NS: Final = 5 * 10**9  # between the clocks of gateways


@dataclass(frozen=True, slots=True)
class Epoch:
    epoch: str  # empty where there has never been one
    strayed: bool  # something was admitted that its counters do not know


@dataclass(slots=True)
class Counted:
    """One scope, from the holds that were placed in it."""

    num_requests: int = 0  # of the last minute
    num_tokens: int = 0  # of the last minute
    num_tokens_of_day: int = 0
    num_tokens_open: int = 0  # of the last minute and not settled: may come back


@dataclass(frozen=True, slots=True)
class OpenRequest:
    request_id: str
    num_tokens: int
    in_minute: bool
    in_day: bool
    scope_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Counters:
    """All that the store needs to know of an organisation."""

    organisation_id: str
    day: int  # since 1970, UTC
    scopes: dict[str, Counted]
    open_requests: list[OpenRequest] = field(default_factory=list)


async def current_epoch(conn: AsyncConnection, organisation_id: str) -> Epoch:
    query = select(_EPOCH.c.epoch, _EPOCH.c.strayed).where(_EPOCH.c.organisation_id == organisation_id)
    row = (await conn.execute(query)).first()
    return Epoch("", False) if row is None else Epoch(row.epoch, row.strayed)


async def mark_strayed(conn: AsyncConnection, organisation_id: str) -> None:
    """In the transaction of a hold that a policy has admitted, after its tenant's accounts were locked."""
    await conn.execute(update(_EPOCH).where(_EPOCH.c.organisation_id == organisation_id).values(strayed=True))


async def lock_tenants(conn: AsyncConnection, organisation_id: str) -> list[str]:
    """The organisation's tenants, in whose accounts no hold appears before this transaction ends."""
    tenant, account = tables.tenant, tables.account
    rows = await conn.execute(select(tenant.c.id).where(tenant.c.organisation_id == organisation_id))
    tenant_ids = list(rows.scalars())
    locked = select(account.c.id).where(account.c.tenant_id.in_(tenant_ids)).order_by(account.c.id)
    await conn.execute(locked.with_for_update())
    return tenant_ids


async def lock_epoch(conn: AsyncConnection, organisation_id: str, *, now_ns: int) -> str:
    """The epoch, which nobody else changes before this transaction ends; empty where there has never been one.

    After lock_tenants, as holds take the two.
    """
    dialect: Any = postgresql if conn.dialect.name == "postgresql" else sqlite
    first = {"organisation_id": organisation_id, "epoch": "", "strayed": False, "updated_ns": now_ns}
    await conn.execute(dialect.insert(_EPOCH).values(first).on_conflict_do_nothing())
    query = select(_EPOCH.c.epoch).where(_EPOCH.c.organisation_id == organisation_id).with_for_update()
    return str(await conn.scalar(query))


async def change_epoch(conn: AsyncConnection, organisation_id: str, epoch: str, *, now_ns: int) -> None:
    """Needs lock_epoch."""
    mine = update(_EPOCH).where(_EPOCH.c.organisation_id == organisation_id)
    await conn.execute(mine.values(epoch=epoch, strayed=False, updated_ns=now_ns))


async def counters_of(conn: AsyncConnection, organisation_id: str, tenant_ids: list[str], *, now_ns: int) -> Counters:
    """What the holds of an organisation come to. Needs lock_tenants, whose answer it takes."""
    minute_ns, day_ns = now_ns - MINUTE_NS - SKEW_NS, now_ns - now_ns % DAY_NS
    scopes: defaultdict[str, Counted] = defaultdict(Counted)
    for scope_id in (organisation_id, *tenant_ids):
        scopes[scope_id] = Counted()
    for row in await conn.execute(_sums(tenant_ids, minute_ns, day_ns)):
        for scope_id in _chain(organisation_id, row):
            one = scopes[scope_id]
            one.num_requests += row.num_requests
            one.num_tokens += row.num_tokens
            one.num_tokens_of_day += row.num_tokens_of_day
    open_requests = []
    pending = select(_HOLD).where(_HOLD.c.state == "pending", _HOLD.c.tenant_id.in_(tenant_ids))
    for row in await conn.execute(pending):
        in_minute, in_day = row.created_ns >= minute_ns, row.created_ns >= day_ns
        chain = tuple(_chain(organisation_id, row))
        num_tokens = row.num_tokens or 0
        open_requests.append(OpenRequest(row.request_id, num_tokens, in_minute, in_day, chain))
        if in_minute:
            for scope_id in chain:
                scopes[scope_id].num_tokens_open += num_tokens
    return Counters(organisation_id, now_ns // DAY_NS, dict(scopes), open_requests)


def _sums(tenant_ids: list[str], minute_ns: int, day_ns: int) -> Any:
    tokens = func.coalesce(_HOLD.c.num_tokens, 0)
    in_minute = _HOLD.c.created_ns >= minute_ns

    def total(condition: Any, amount: Any) -> Any:
        return func.coalesce(func.sum(case((condition, amount), else_=0)), 0)

    return (
        select(
            _HOLD.c.tenant_id,
            _HOLD.c.project_id,
            _HOLD.c.key_id,
            total(in_minute, 1).label("num_requests"),
            total(in_minute, tokens).label("num_tokens"),
            total(_HOLD.c.created_ns >= day_ns, tokens).label("num_tokens_of_day"),
        )
        .where(_HOLD.c.tenant_id.in_(tenant_ids), _HOLD.c.created_ns >= min(minute_ns, day_ns))
        .group_by(_HOLD.c.tenant_id, _HOLD.c.project_id, _HOLD.c.key_id)
    )


def _chain(organisation_id: str, row: Any) -> Iterable[str]:
    """The scopes that a hold is counted in; one from before there were budgets names no project and key."""
    return (one for one in (organisation_id, row.tenant_id, row.project_id, row.key_id) if one is not None)


_HOLD: Final = tables.hold
_EPOCH: Final = quota_tables.quota_epoch
