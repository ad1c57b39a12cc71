"""One row a tenant for the admin page, in three queries however many tenants there are."""

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.access.directory import TenantStatus
from tenancy.accounts.posting import CURRENCY
from tenancy.money import BIGINT_MAX
from tenancy.quotas.limits import ScopeLimits, limit_names
from tenancy.usage.meter import TenantUsage, usage_by_tenant


@dataclass(frozen=True, slots=True)
class TenantOverview:
    """Usage and billed money of the period asked for; credit, held and limits as they are now."""

    tenant_id: str
    name: str
    status: TenantStatus
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    billed_nano_usd: int
    held_nano_usd: int
    credit_nano_usd: int
    limits: ScopeLimits
    currency: str = CURRENCY


async def tenant_overview(conn: AsyncConnection, since_ns: int = 0, until_ns: int = BIGINT_MAX) -> list[TenantOverview]:
    """Every tenant by name, idle and deleted ones included; requests that finished in [since_ns, until_ns)."""
    tenant, limit, account = tables.tenant, tables.scope_limit, tables.account
    tenants = await conn.execute(
        select(
            tenant.c.id,
            tenant.c.name,
            tenant.c.status,
            tenant.c.organisation_id,
            limit.c.requests_per_minute,
            limit.c.tokens_per_minute,
            limit.c.concurrency_max,
            limit.c.weight,
            limit.c.tokens_per_day,
            limit.c.shadow,
        )
        .outerjoin(limit, limit.c.scope_id == tenant.c.id)
        .order_by(tenant.c.name)
    )
    accounts = await conn.execute(
        select(account.c.tenant_id, account.c.kind, account.c.balance_nano_usd, account.c.currency).where(
            account.c.kind.in_(("credit", "held"))
        )
    )
    money, currencies = {}, {}
    for tenant_id, kind, amount, currency in accounts:
        money[tenant_id, kind], currencies[tenant_id] = amount, currency
    used = {usage.tenant_id: usage for usage in await usage_by_tenant(conn, since_ns, until_ns)}
    overview = []
    for id_, name, status, organisation_id, rpm, tpm, concurrency_max, weight, tpd, shadow in tenants:
        usage = used.get(id_, TenantUsage(id_, 0, 0, 0, 0, 0))
        overview.append(
            TenantOverview(
                tenant_id=id_,
                name=name,
                status=status,
                num_requests=usage.num_requests,
                num_prompt_tokens=usage.num_prompt_tokens,
                num_cached_tokens=usage.num_cached_tokens,
                num_completion_tokens=usage.num_completion_tokens,
                billed_nano_usd=usage.amount_nano_usd,
                held_nano_usd=money.get((id_, "held"), 0),
                credit_nano_usd=money.get((id_, "credit"), 0),
                limits=ScopeLimits(
                    id_, rpm, tpm, concurrency_max, organisation_id, weight or 1, tpd, limit_names(shadow)
                ),
                currency=currencies.get(id_, CURRENCY),
            )
        )
    return overview
