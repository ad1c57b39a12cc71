"""Deleting a tenant: its keys are revoked, answers retained for it are deleted, nothing new is admitted.

What it paid and used stays on the books.

Refused while money is held, so that no request of a deleted tenant is ever left to settle. Against a request that is
admitted at the same moment the tenant's account rows decide: placing a hold takes them too, and looks at the tenant's
status after that (`require_active`). So either the hold is there first and deletion is refused, or the hold is refused.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Select, bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.access.directory import Tenant, set_tenant_status
from tenancy.access.keys import revoke_keys_of
from tenancy.accounts.credit_line import get_line
from tenancy.accounts.ledger import lock_balance
from tenancy.accounts.posting import currency_of
from tenancy.idempotency import forget_tenant
from tenancy.quotas import quota_tables


class MoneyHeldError(ValueError):
    """The tenant has requests in flight, or open since a crash; the message says how much they hold."""


class TenantInactiveError(Exception):
    """The tenant was suspended or deleted between authentication and admission, or while its request ran."""


@dataclass(frozen=True, slots=True)
class Closed:
    tenant: Tenant
    num_keys_revoked: int
    credit_nano_usd: int  # prepaid and not spent: stays on the books
    currency: str


async def delete_tenant(conn: AsyncConnection, tenant_id: str, *, now_ns: int) -> Closed:
    """Deleting twice changes nothing more. Raises MoneyHeldError or UnknownAccountError."""
    balance = await lock_balance(conn, tenant_id)
    if balance.held_nano_usd:
        raise MoneyHeldError(
            f"requests of the tenant still hold {balance.held_nano_usd} nano-units: suspend it and wait for them to end"
        )
    tenant = await set_tenant_status(conn, tenant_id, "deleted")
    await forget_tenant(conn, tenant_id)
    num_keys_revoked = await revoke_keys_of(conn, tenant_id, now_ns=now_ns)
    line = await get_line(conn, tenant_id)
    left_nano_usd = balance.credit_nano_usd - (0 if line is None else line.left_nano_usd)
    return Closed(tenant, num_keys_revoked, left_nano_usd, await currency_of(conn, tenant_id))


async def deleted_tenants(conn: AsyncConnection) -> list[str]:
    """Their ids."""
    table = tables.tenant
    return list((await conn.execute(select(table.c.id).where(table.c.status == "deleted"))).scalars())


async def require_active(conn: AsyncConnection, tenant_id: str) -> str:
    """Call it after place_hold, in the same transaction; the epoch of the tenant's quotas (quota_epochs.py).

    Raises TenantInactiveError.
    """
    row = (await conn.execute(_STATUS, {"of": tenant_id})).first()
    if row is None or row.status != "active":
        raise TenantInactiveError
    return row.epoch or ""


async def inactive_among(conn: AsyncConnection, tenant_ids: Collection[str]) -> set[str]:
    """Those of the tenants that are suspended or deleted."""
    table = tables.tenant
    query = select(table.c.id).where(table.c.id.in_(tenant_ids), table.c.status != "active")
    return set((await conn.execute(query)).scalars())


def _status() -> Select[Any]:
    """Built once, as in posting.py."""
    table, epoch = tables.tenant, quota_tables.quota_epoch
    joined = table.outerjoin(epoch, epoch.c.organisation_id == table.c.organisation_id)
    return select(table.c.status, epoch.c.epoch).select_from(joined).where(table.c.id == bindparam("of"))


_STATUS: Final = _status()
