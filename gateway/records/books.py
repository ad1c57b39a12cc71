"""What each tenant cost and left over, as the command with ``--json`` and the route show it."""

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.records.plain import Record, record
from tenancy.access.directory import list_tenants
from tenancy.accounts.posting import currency_of
from tenancy.usage.attribution import attribute, cost_nano_usd, read_spans
from tenancy.usage.engine_time import read_engine_time

HOUSE = ("own", "idle", "other")  # the engine's time that is no tenant's


async def margin_record(
    conn: AsyncConnection, since_ns: int, until_ns: int, *, rate_nano_usd: int, currency: str, block_size: int
) -> Record:
    """Of [since_ns, until_ns), the largest share of the engine's time first. ``rate_nano_usd``: what an hour of the
    engine costs, in ``currency``; a tenant with an account in another one has no margin."""
    spans, engines = await read_spans(conn, since_ns, until_ns), await read_engine_time(conn, since_ns, until_ns)
    found = attribute(spans, since_ns, until_ns, block_size=block_size, engines=engines)
    names = {one.tenant_id: one.name for one in await list_tenants(conn)}
    rows = []
    for tenant_id, share in sorted(found.shares.items(), key=lambda one: -one[1].engine_ns):
        cost, own = cost_nano_usd(share.engine_ns, rate_nano_usd), await currency_of(conn, tenant_id)
        margin = share.revenue_nano_usd - cost if own == currency else None
        figures = {"currency": own, "cost_nano_usd": cost, "margin_nano_usd": margin}
        rows.append({"tenant": names[tenant_id], "tenant_id": tenant_id, **record(share), **figures})
    times = (found.own_ns, found.idle_ns, found.other_ns)
    house = {f"{name}_ns": time_ns for name, time_ns in zip(HOUSE, times, strict=True)}
    house |= {f"{name}_cost_nano_usd": cost_nano_usd(house[f"{name}_ns"], rate_nano_usd) for name in HOUSE}
    head = {"since_ns": since_ns, "until_ns": until_ns, "num_engines": found.num_engines}
    num_estimated = sum(share.num_estimated for share in found.shares.values())
    return {**head, "tenants": rows, **house, "num_estimated": num_estimated, "cost_currency": currency}
