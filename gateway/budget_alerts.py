"""Budget alerts and credit that expired become log entries in the transaction that found them: each once, as it is."""

from collections.abc import Callable, Iterable

from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from tenancy.accounts.budget_use import Budget, BudgetAlert
from tenancy.accounts.credits import ExpiredCredit
from tenancy.accounts.ledger import Settled


async def append_settled(
    conn: AsyncConnection, settled: Settled, at_ns: int, *, entropy: Callable[[int], bytes]
) -> None:
    """What the end of a hold has brought with it."""
    await append_alerts(conn, settled.alerts, at_ns, entropy=entropy)
    await append_expired(conn, settled.expired, at_ns, entropy=entropy)


async def append_expired(
    conn: AsyncConnection, expired: Iterable[ExpiredCredit], at_ns: int, *, entropy: Callable[[int], bytes]
) -> None:
    for one in expired:
        body: dict[str, str | int | bool | list[str]] = {
            "transfer_id": one.credit_id,
            "credit_kind": one.kind,
            "amount_nano_usd": one.amount_nano_usd,
            "expires_ns": one.expires_ns,
        }
        await append(conn, Entry("credit.expired", one.tenant_id, at_ns, body), entropy=entropy)


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
