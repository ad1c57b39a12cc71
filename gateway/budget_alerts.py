"""Budget alerts become log entries in the transaction that reached the threshold: exactly once, as it is."""

from collections.abc import Callable, Iterable

from sqlalchemy.ext.asyncio import AsyncConnection

from audit.entry import Entry
from audit.outbox import append
from tenancy.budget_use import Budget, BudgetAlert


async def append_alerts(
    conn: AsyncConnection, alerts: Iterable[BudgetAlert], at_ns: int, *, entropy: Callable[[int], bytes]
) -> None:
    for alert in alerts:
        body: dict[str, str | int | bool | list[str]] = {
            **budget_fields(alert.budget),
            "threshold_percent": alert.threshold_percent,
            "used_nano_usd": alert.used_nano_usd,
            "limit_nano_usd": alert.budget.limit_nano_usd,
            "period_start_ns": alert.period_start_ns,
        }
        await append(conn, Entry("budget.alert", alert.budget.tenant_id, at_ns, body), entropy=entropy)


def budget_fields(budget: Budget) -> dict[str, str | int | bool | list[str]]:
    """What names a budget in the log."""
    return {
        "scope_kind": budget.scope_kind,
        "scope_id": budget.scope_id,
        "period": budget.period,
        "hard": budget.hard,
    }
