"""Budgets as rules: how much a tenant, project or key may spend in a day, a month or in all. Amounts are nano-USD.

A hard budget stops requests, as credit does; a soft one only tells. One of each a scope and period. What has been
used is counted by budget_use.py: a budget that is set in the middle of a period counts what was spent before it.
"""

from dataclasses import replace
from typing import Final

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.access.directory import owner_of
from tenancy.accounts.budget_use import (
    BUDGET_COLUMNS,
    Budget,
    BudgetAlert,
    BudgetScope,
    budget_uses,
    make_counter,
    write_and_alert,
)
from tenancy.accounts.ledger import lock_balance
from tenancy.invoicing.periods import Period
from tenancy.money import require_amount, require_int

BUDGETS_MAX: Final = 1_000  # of a tenant: bounds what its page and `budget list` read


class BudgetError(ValueError):
    """There are too many budgets, or not the one that was named; the message says which."""


async def set_budget(
    conn: AsyncConnection,
    scope_kind: BudgetScope,
    scope_id: str,
    period: Period,
    *,
    hard: bool,
    limit_nano_usd: int,
    now_ns: int,
) -> tuple[Budget, list[BudgetAlert]]:
    """Set or replace one budget; the thresholds that its use has already reached.

    A changed limit counts on from what is used, and its thresholds begin anew. Raises UnknownIdError, BudgetError or
    MoneyRangeError.
    """
    require_amount(limit_nano_usd, "limit_nano_usd")
    require_int(now_ns, "now_ns")
    tenant_id = await owner_of(conn, scope_kind, scope_id)
    await lock_balance(conn, tenant_id)  # counters move under these locks
    budget = Budget(_id(scope_id, period, hard), tenant_id, scope_kind, scope_id, period, hard, limit_nano_usd)
    uses = {use.budget.budget_id: use for use in await budget_uses(conn, tenant_id, now_ns)}
    earlier = uses.get(budget.budget_id)
    if earlier is None:
        if len(uses) >= BUDGETS_MAX:
            raise BudgetError(f"a tenant may have {BUDGETS_MAX} budgets: remove one first")
        await conn.execute(
            insert(tables.budget).values(
                id=budget.budget_id,
                tenant_id=tenant_id,
                scope_kind=scope_kind,
                scope_id=scope_id,
                period=period,
                hard=hard,
                limit_nano_usd=limit_nano_usd,
                updated_ns=now_ns,
            )
        )
    elif earlier.budget == budget:
        return budget, []
    else:
        table = tables.budget
        changed = update(table).where(table.c.id == budget.budget_id)
        await conn.execute(changed.values(limit_nano_usd=limit_nano_usd, updated_ns=now_ns))
        await conn.execute(delete(_USE).where(_USE.c.budget_id == budget.budget_id))
    use = await make_counter(conn, budget, now_ns)
    return budget, await write_and_alert(conn, replace(use, alerted_percent=0))


async def remove_budget(conn: AsyncConnection, scope_id: str, period: Period, *, hard: bool) -> Budget:
    """Raises BudgetError where there is none."""
    table, id_ = tables.budget, _id(scope_id, period, hard)
    query = select(*BUDGET_COLUMNS).where(table.c.id == id_)
    row = (await conn.execute(query)).first()
    if row is not None:
        await lock_balance(conn, row.tenant_id)
        row = (await conn.execute(query)).first()  # another may have removed it meanwhile
    if row is None:
        raise BudgetError(f"{scope_id} has no budget {id_.removeprefix(scope_id + ':')!r}; see: bulkhead budget list")
    await conn.execute(delete(_USE).where(_USE.c.budget_id == id_))
    await conn.execute(delete(table).where(table.c.id == id_))
    return Budget(*row)


def _id(scope_id: str, period: Period, hard: bool) -> str:
    """Made of what is unique, so that a second budget of the same kind finds the first."""
    return f"{scope_id}:{period}:{'hard' if hard else 'soft'}"


_USE: Final = tables.budget_use
