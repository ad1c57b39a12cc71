"""Tenants, their projects, keys, limits and policies as commands with ``--json`` and routes show them."""

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.records.plain import Record, record
from tenancy.access.directory import Tenant
from tenancy.access.keys import ApiKey
from tenancy.accounts.ledger import balance
from tenancy.accounts.posting import currency_of
from tenancy.quotas.limits import LIMIT_NAMES, ScopeLimits, get_limits


async def tenant_records(conn: AsyncConnection, tenants: Sequence[Tenant]) -> list[Record]:
    """With what is left of their money, and their limits."""
    rules = await get_limits(conn, [one.tenant_id for one in tenants])
    found = []
    for one in tenants:
        money = await balance(conn, one.tenant_id)
        rule = rules.get(one.tenant_id, ScopeLimits(one.tenant_id))
        currency = {"currency": await currency_of(conn, one.tenant_id)}
        found.append(record(one) | currency | record(money) | {"limits": limits_record(rule), "weight": rule.weight})
    return found


def limits_record(limits: ScopeLimits) -> Record:
    """None: no limit."""
    return {name: getattr(limits, name) for name in LIMIT_NAMES} | {"shadow": sorted(limits.shadow)}


def key_record(key: ApiKey, now_ns: int) -> Record:
    """Never its secret."""
    return record(key) | {"state": key.state(now_ns)}
