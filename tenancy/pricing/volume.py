"""How many tokens an account has had in a calendar month (UTC) at prices with graduated steps.

One counter per tenant, model, tier of the price and month of the request's start. A settlement takes the next
[before, before + n) of it and stamps `before` on the usage row, so that a charge can be computed again from its row
alone. The month is that in which the request started: what was there at its admission can only have grown since,
which is why the worst case that was held then covers the charge, whatever was settled between.

Only prices with steps count, from the first such price on: without them nothing is counted and nothing costs time.

Locks: taken after the hold's row and before the account rows, see ledger.py.
"""

from typing import Final

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.invoicing.periods import period_start_ns
from tenancy.money import require_amount
from tenancy.pricing import price_tables
from tenancy.pricing.prices import Price


async def volume_of(conn: AsyncConnection, tenant_id: str, price: Price, started_ns: int) -> int:
    """Tokens counted so far in the month of `started_ns`; 0 for a price without steps. Reads only."""
    if not price.steps:
        return 0
    month_ns = period_start_ns("month", started_ns)
    query = select(_TABLE.c.num_tokens).where(
        _TABLE.c.tenant_id == tenant_id,
        _TABLE.c.model == price.model,
        _TABLE.c.tier == price.tier,
        _TABLE.c.month_start_ns == month_ns,
    )
    return await conn.scalar(query) or 0


async def take_volume(conn: AsyncConnection, tenant_id: str, price: Price, started_ns: int, num_tokens: int) -> int:
    """Count `num_tokens` more; how many there were before. Call it once a request, holding the hold's row."""
    if not price.steps:
        return 0
    require_amount(num_tokens, "num_tokens")
    dialect = postgresql if conn.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(_TABLE).values(
        tenant_id=tenant_id,
        model=price.model,
        tier=price.tier,
        month_start_ns=period_start_ns("month", started_ns),
        num_tokens=num_tokens,
    )
    counted: int | None = await conn.scalar(
        statement.on_conflict_do_update(
            index_elements=list(_TABLE.primary_key), set_={"num_tokens": _TABLE.c.num_tokens + num_tokens}
        ).returning(_TABLE.c.num_tokens)
    )
    assert counted is not None, "an upsert gives its row back"
    return counted - num_tokens


_TABLE: Final = price_tables.volume


async def lock_hold(conn: AsyncConnection, hold_id: str) -> None:
    """Wait until nobody else settles it: for whoever counts volume before the capture."""
    await conn.execute(select(tables.hold.c.id).where(tables.hold.c.id == hold_id).with_for_update())
