"""What the admin page reads from the tenancy tables. Read only; one snapshot, the caller's; money as the ledger has it.

The overview's rows come from tenancy/usage/overview.py; here is what it does not have. Every list is bounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.tables import account, api_key, hold, ledger_entry, operator, project, tenant, usage_record
from tenancy.usage.meter import TenantUsage


@dataclass(frozen=True, slots=True)
class TenantRow:
    tenant_id: str
    name: str
    status: str


@dataclass(frozen=True, slots=True)
class MinuteSums:
    minute: int  # 0 = the first after since_ns
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True)
class UsageRow:
    request_id: str
    key_public_id: str
    model: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    amount_nano_usd: int
    finished_ns: int
    finish_reason: str
    engine_ns: int | None  # None: not measured


@dataclass(frozen=True, slots=True)
class KeyRow:
    public_id: str
    project_name: str
    name: str
    scopes: str
    created_ns: int
    expires_ns: int | None
    revoked_ns: int | None


@dataclass(frozen=True, slots=True)
class HoldRow:
    request_id: str
    amount_nano_usd: int
    created_ns: int
    expires_ns: int


async def one_tenant(conn: AsyncConnection, tenant_id: str) -> TenantRow | None:
    if not tenant_id.isprintable():  # PostgreSQL refuses NUL in a parameter
        return None
    query = select(tenant.c.id, tenant.c.name, tenant.c.status).where(tenant.c.id == tenant_id)
    row = (await conn.execute(query)).first()
    return TenantRow(*row) if row is not None else None


async def usage_of(conn: AsyncConnection, tenant_id: str) -> TenantUsage:
    """One tenant's usage of all time."""
    u = usage_record.c
    query = select(
        func.count(),
        func.coalesce(func.sum(u.num_prompt_tokens), 0),
        func.coalesce(func.sum(u.num_cached_tokens), 0),
        func.coalesce(func.sum(u.num_completion_tokens), 0),
        func.coalesce(func.sum(u.amount_nano_usd), 0),
    ).where(u.tenant_id == tenant_id)
    row = (await conn.execute(query)).one()
    return TenantUsage(tenant_id, *(int(value) for value in row))


async def minute_sums(
    conn: AsyncConnection, since_ns: int, until_ns: int, minute_ns: int, tenant_id: str | None = None
) -> dict[str, list[MinuteSums]]:
    """Tokens per tenant and minute over [since_ns, until_ns); minutes without requests are missing."""
    u = usage_record.c
    minute = ((u.finished_ns - since_ns) // minute_ns).label("minute")
    query = select(
        u.tenant_id,
        minute,
        func.sum(u.num_prompt_tokens),
        func.sum(u.num_cached_tokens),
        func.sum(u.num_completion_tokens),
    ).where(u.finished_ns >= since_ns, u.finished_ns < until_ns)
    if tenant_id is not None:
        query = query.where(u.tenant_id == tenant_id)
    found: dict[str, list[MinuteSums]] = {}
    for row in await conn.execute(query.group_by(u.tenant_id, minute)):
        found.setdefault(row[0], []).append(MinuteSums(*(int(value) for value in row[1:])))
    return found


async def account_balances(conn: AsyncConnection, tenant_id: str) -> dict[str, int]:
    """Account kind -> balance in nano-USD, as the ledger keeps it."""
    a = account.c
    query = select(a.kind, a.balance_nano_usd).where(a.tenant_id == tenant_id)
    return {kind: int(balance) for kind, balance in await conn.execute(query)}


async def entry_sums(conn: AsyncConnection, tenant_id: str) -> dict[str, int]:
    """Account kind -> the sum of its ledger entries: what the balance must be."""
    query = (
        select(account.c.kind, func.coalesce(func.sum(ledger_entry.c.amount_nano_usd), 0))
        .select_from(account)
        .outerjoin(ledger_entry, ledger_entry.c.account_id == account.c.id)
        .where(account.c.tenant_id == tenant_id)
        .group_by(account.c.kind)
    )
    return {kind: int(total) for kind, total in await conn.execute(query)}


async def recent_usage(
    conn: AsyncConnection, tenant_id: str, before: tuple[int, str] | None, limit: int
) -> Sequence[UsageRow]:
    """Newest first, from just below `before` (finished_ns, request_id); two rows never share a place."""
    u = usage_record.c
    query: Select[Any] = (
        select(
            u.request_id,
            api_key.c.public_id,
            u.model,
            u.num_prompt_tokens,
            u.num_cached_tokens,
            u.num_completion_tokens,
            u.amount_nano_usd,
            u.finished_ns,
            u.finish_reason,
            u.engine_ns,
        )
        .join(api_key, api_key.c.id == u.key_id)
        .where(u.tenant_id == tenant_id)
        .order_by(u.finished_ns.desc(), u.request_id.desc())
        .limit(limit)
    )
    if before is not None:
        at_ns, request_id = before
        query = query.where(or_(u.finished_ns < at_ns, and_(u.finished_ns == at_ns, u.request_id < request_id)))
    return [UsageRow(*row) for row in await conn.execute(query)]


async def tenant_keys(conn: AsyncConnection, tenant_id: str, limit: int) -> list[KeyRow]:
    """Living keys first, then newest first. The stored HMACs are not even read."""
    k = api_key.c
    query = (
        select(k.public_id, project.c.name, k.name, k.scopes, k.created_ns, k.expires_ns, k.revoked_ns)
        .join(project, project.c.id == k.project_id)
        .where(project.c.tenant_id == tenant_id)
        .order_by(k.revoked_ns.is_not(None), k.created_ns.desc(), k.id)
        .limit(limit)
    )
    return [KeyRow(*row) for row in await conn.execute(query)]


async def tenant_holds(conn: AsyncConnection, tenant_id: str, limit: int) -> list[HoldRow]:
    """Pending holds, the first to expire first."""
    h = hold.c
    query = (
        select(h.request_id, h.amount_nano_usd, h.created_ns, h.expires_ns)
        .where(h.tenant_id == tenant_id, h.state == "pending")
        .order_by(h.expires_ns, h.id)
        .limit(limit)
    )
    return [HoldRow(*row) for row in await conn.execute(query)]


async def pending_sum(conn: AsyncConnection, tenant_id: str) -> tuple[int, int]:
    """How many holds are pending, and their sum in nano-USD."""
    query = select(func.count(), func.coalesce(func.sum(hold.c.amount_nano_usd), 0)).where(
        hold.c.tenant_id == tenant_id, hold.c.state == "pending"
    )
    num_holds, total = (await conn.execute(query)).one()
    return int(num_holds), int(total)


async def is_active_operator(conn: AsyncConnection, operator_id: str) -> bool:
    query = select(operator.c.id).where(operator.c.id == operator_id, operator.c.disabled_ns.is_(None))
    return (await conn.execute(query)).first() is not None


async def operator_exists(conn: AsyncConnection, name: str) -> bool:
    if not name.isprintable():  # PostgreSQL refuses NUL in a parameter
        return False
    return (await conn.execute(select(operator.c.id).where(operator.c.name == name))).first() is not None
