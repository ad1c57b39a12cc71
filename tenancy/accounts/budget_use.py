"""What each budget has used and holds in a period: counters beside the ledger, moved in its own transactions.

    place     held += x                    refused where a hard budget has used + held + x > limit
    capture   held -= x    used += a       a <= x, so used + held never grows here
    void, expire   held -= x

Thus used + held <= limit for a hard budget, always. The exception is a limit that was lowered below it: then nothing
that costs is admitted until the period ends.

A hold belongs to the period in which it was placed, also when it is settled after midnight or in the next month. So a
period's figures may still move after its end, by what was admitted in it, and never beyond its limit.

A counter is a sum over holds, kept so that nobody has to add them up: its row is made from that sum when it is first
needed, and every later move changes both. The row is only touched under the locks of the tenant's account rows
(ledger.py), so it needs none of its own.

Alerts: when what is used reaches 50, 80, 95 and 100 % of the limit, each once for a period and limit. The row
remembers the highest one that was given; whoever moves it there writes the alert in the same transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Select, and_, bindparam, case, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.invoicing.periods import PERIODS, Period, period_end_ns, period_start_ns

BudgetScope = Literal["tenant", "project", "key"]
THRESHOLDS_PERCENT: Final = (50, 80, 95, 100)


@dataclass(frozen=True, slots=True)
class Budget:
    budget_id: str
    tenant_id: str
    scope_kind: BudgetScope
    scope_id: str
    period: Period
    hard: bool
    limit_nano_usd: int

    @property
    def name(self) -> str:
        """As a caller sees it, for whom it is unique among hard budgets: `project-month`."""
        return f"{self.scope_kind}-{self.period}"


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """One budget in one period."""

    budget: Budget
    period_start_ns: int
    period_end_ns: int | None  # None: it has no end
    used_nano_usd: int  # charged for what was admitted in the period
    held_nano_usd: int  # promised to what was admitted in the period and still runs
    alerted_percent: int  # the highest threshold that has been told; 0: none

    @property
    def left_nano_usd(self) -> int:
        """Below zero only where the limit was lowered."""
        return self.budget.limit_nano_usd - self.used_nano_usd - self.held_nano_usd


@dataclass(frozen=True, slots=True)
class BudgetAlert:
    """A threshold was reached: whoever gets this writes it to the log, in this transaction."""

    budget: Budget
    threshold_percent: int
    used_nano_usd: int
    period_start_ns: int


@dataclass(frozen=True, slots=True)
class Spender:
    """Whose money: a request counts in the budgets of all three. Holds from before there were budgets name no project
    and key, unless their request was billed."""

    tenant_id: str
    project_id: str | None
    key_id: str | None

    @property
    def scope_ids(self) -> list[str]:
        return [id_ for id_ in (self.tenant_id, self.project_id, self.key_id) if id_ is not None]


async def open_counters(conn: AsyncConnection, spender: Spender, at_ns: int) -> list[BudgetUse]:
    """The spender's budgets in the periods of `at_ns`, each with a row from now on. Needs the account locks."""
    found = await _read(conn, _OF_SCOPES, {"of": spender.scope_ids}, at_ns)
    return [use if exists else await make_counter(conn, use.budget, at_ns) for use, exists in found]


async def reserve(conn: AsyncConnection, uses: Sequence[BudgetUse], amount_nano_usd: int) -> None:
    """Count a hold that has just been placed into the counters that open_counters gave."""
    for use in uses:
        await _write(conn, replace(use, held_nano_usd=use.held_nano_usd + amount_nano_usd))


async def settle(
    conn: AsyncConnection, spender: Spender, placed_ns: int, amount_nano_usd: int, captured_nano_usd: int
) -> tuple[BudgetAlert, ...]:
    """Move a hold's amount out of `held` and what it cost into `used`; the thresholds that this reached.

    A counter that has no row is no budget's: its budget came after that period.
    """
    alerts: list[BudgetAlert] = []
    for use, exists in await _read(conn, _OF_SCOPES, {"of": spender.scope_ids}, placed_ns):
        if exists:
            moved = replace(
                use,
                used_nano_usd=use.used_nano_usd + captured_nano_usd,
                held_nano_usd=use.held_nano_usd - amount_nano_usd,
            )
            alerts += await write_and_alert(conn, moved)
    return tuple(alerts)


async def write_and_alert(conn: AsyncConnection, use: BudgetUse) -> list[BudgetAlert]:
    """Store a counter's figures; the thresholds that it has reached and nobody was told of."""
    used, limit = use.used_nano_usd, use.budget.limit_nano_usd
    reached = [t for t in THRESHOLDS_PERCENT if t > use.alerted_percent and used and used * 100 >= t * limit]
    await _write(conn, replace(use, alerted_percent=max([use.alerted_percent, *reached])))
    return [BudgetAlert(use.budget, threshold, used, use.period_start_ns) for threshold in reached]


async def budget_uses(conn: AsyncConnection, tenant_id: str, at_ns: int) -> list[BudgetUse]:
    """A tenant's budgets and their figures in the periods of `at_ns`. Reads only."""
    return [use for use, _ in await _read(conn, _OF_TENANT, {"of": tenant_id}, at_ns)]


async def make_counter(conn: AsyncConnection, budget: Budget, at_ns: int) -> BudgetUse:
    """The row of a budget's period, from the holds that were placed in it. Needs the account locks."""
    hold, start_ns, end_ns = tables.hold, period_start_ns(budget.period, at_ns), period_end_ns(budget.period, at_ns)
    scope = {"tenant": hold.c.tenant_id, "project": hold.c.project_id, "key": hold.c.key_id}[budget.scope_kind]
    held = func.sum(case((hold.c.state == "pending", hold.c.amount_nano_usd), else_=0))
    query = (
        select(func.coalesce(func.sum(hold.c.captured_nano_usd), 0), func.coalesce(held, 0))
        .where(hold.c.tenant_id == budget.tenant_id, scope == budget.scope_id, hold.c.created_ns >= start_ns)
        .where(hold.c.created_ns < end_ns if end_ns is not None else hold.c.created_ns >= start_ns)
    )
    used, held_now = (await conn.execute(query)).one()
    use = BudgetUse(budget, start_ns, end_ns, int(used), int(held_now), 0)
    await conn.execute(
        insert(_USE).values(
            budget_id=budget.budget_id,
            period_start_ns=start_ns,
            used_nano_usd=use.used_nano_usd,
            held_nano_usd=use.held_nano_usd,
            alerted_percent=0,
        )
    )
    return use


async def _read(
    conn: AsyncConnection, query: Select[Any], of: dict[str, Any], at_ns: int
) -> list[tuple[BudgetUse, bool]]:
    """Budgets with their figures in the periods of `at_ns`, and whether those have a row."""
    starts = {f"start_of_{period}": period_start_ns(period, at_ns) for period in PERIODS}
    rows = await conn.execute(query, of | starts)
    return [(_use(Budget(*row[:7]), row[7:], at_ns), row.used_nano_usd is not None) for row in rows]


def _use(budget: Budget, figures: Sequence[Any], at_ns: int) -> BudgetUse:
    used, held, alerted = (figure or 0 for figure in figures)
    start_ns, end_ns = period_start_ns(budget.period, at_ns), period_end_ns(budget.period, at_ns)
    return BudgetUse(budget, start_ns, end_ns, used, held, alerted)


async def _write(conn: AsyncConnection, use: BudgetUse) -> None:
    assert min(use.used_nano_usd, use.held_nano_usd) >= 0, f"budget {use.budget.budget_id} would count below zero"
    figures = {
        "of": use.budget.budget_id,
        "start": use.period_start_ns,
        "used": use.used_nano_usd,
        "held": use.held_nano_usd,
        "alerted": use.alerted_percent,
    }
    await conn.execute(_WRITTEN, figures)


_BUDGET: Final = tables.budget
_USE: Final = tables.budget_use
BUDGET_COLUMNS: Final = (  # as Budget has them
    _BUDGET.c.id,
    _BUDGET.c.tenant_id,
    _BUDGET.c.scope_kind,
    _BUDGET.c.scope_id,
    _BUDGET.c.period,
    _BUDGET.c.hard,
    _BUDGET.c.limit_nano_usd,
)


def _reading(which: ColumnElement[bool]) -> Select[Any]:
    """Built once, as in posting.py."""
    in_period = or_(
        *(
            and_(
                _BUDGET.c.period == period,
                _USE.c.period_start_ns == _bound(f"start_of_{period}"),
            )
            for period in PERIODS
        )
    )
    return (
        select(*BUDGET_COLUMNS, _USE.c.used_nano_usd, _USE.c.held_nano_usd, _USE.c.alerted_percent)
        .select_from(_BUDGET.outerjoin(_USE, and_(_USE.c.budget_id == _BUDGET.c.id, in_period)))
        .where(which)
        .order_by(_BUDGET.c.id)
    )


def _bound(name: str) -> Any:
    return bindparam(name, type_=_USE.c.period_start_ns.type)


_OF_SCOPES: Final = _reading(_BUDGET.c.scope_id.in_(bindparam("of", expanding=True)))
_OF_TENANT: Final = _reading(_BUDGET.c.tenant_id == bindparam("of"))
_WRITTEN: Final = (
    update(_USE)
    .where(_USE.c.budget_id == bindparam("of"), _USE.c.period_start_ns == _bound("start"))
    .values(used_nano_usd=_bound("used"), held_nano_usd=_bound("held"), alerted_percent=_bound("alerted"))
)
