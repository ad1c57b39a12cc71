"""The overview's figures: one database snapshot, one look at Valkey, the engine's last report.

The total is added up from the very rows that are shown, so it cannot say anything else than their sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.admin import audit_queries, health, queries
from gateway.admin.chart import Bar
from gateway.admin.limits import LimitUse, limits_in_use
from gateway.admin.wording import NS_PER_S, utc, utc_minute
from gateway.services import Services
from tenancy.usage.overview import tenant_overview

NUM_MINUTES = 60  # of the charts
MINUTE_NS = 60 * NS_PER_S


@dataclass(frozen=True, slots=True)
class Period:
    """What "requests", "tokens" and "billed" are counted over: from `since_ns(now)` until now."""

    name: str
    label: str
    since: Callable[[datetime], datetime | None]  # None: from the beginning

    def since_ns(self, now_ns: int) -> int:
        start = self.since(datetime.fromtimestamp(now_ns // NS_PER_S, tz=UTC))
        return 0 if start is None else int(start.timestamp()) * NS_PER_S

    def describe(self, since_ns: int) -> str:
        return "since the beginning" if since_ns == 0 else f"since {utc(since_ns)}"


PERIODS = (
    Period("hour", "Last hour", lambda now: now - timedelta(hours=1)),
    Period("day", "Today", lambda now: now.replace(hour=0, minute=0, second=0)),
    Period("month", "This month", lambda now: now.replace(day=1, hour=0, minute=0, second=0)),
    Period("all", "All time", lambda _now: None),
)
PERIOD_DEFAULT = "month"


@dataclass(frozen=True, slots=True)
class Money:
    """In nano-units of one currency; what is billed belongs to the period."""

    billed: int
    held: int
    credit: int  # what is left to spend: neither billed nor held


@dataclass(frozen=True, slots=True)
class TenantFigures:
    """One row. Requests, tokens and billed belong to the period; everything else is as of now."""

    tenant_id: str
    name: str
    status: str
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int  # part of num_prompt_tokens
    num_completion_tokens: int
    money: Mapping[str, Money]  # by currency: a tenant has one, the total those of its rows
    num_blocks: int
    limits: Mapping[str, LimitUse]  # "requests", "tokens", "concurrency"
    minutes: tuple[Bar, ...]  # the last NUM_MINUTES, oldest first; the last one is not over yet


@dataclass(frozen=True, slots=True)
class Overview:
    at_ns: int
    period: Period
    since_ns: int
    tenants: tuple[TenantFigures, ...]
    total: TenantFigures
    facts: Mapping[str, health.Fact]


async def gather(services: Services, period: Period) -> Overview:
    """Raises DatabaseUnavailableError or a Redis error; there is no overview of half the figures."""
    now_ns = services.world.now_ns()
    since_ns = period.since_ns(now_ns)
    until_ns = now_ns + 1  # what finished in this very nanosecond counts
    started_ns = services.world.monotonic_ns()
    async with services.database.read() as conn:
        tenants = await tenant_overview(conn, since_ns, until_ns)
        minutes = await gather_minutes(conn, now_ns)
        heartbeat = await audit_queries.last_entry(conn, "audit.heartbeat")
        worker_started = await audit_queries.last_entry(conn, "worker.started")
        num_violations = await audit_queries.count_entries(conn, "isolation.violation")
        log = await audit_queries.log_state(conn)
    database_us = (services.world.monotonic_ns() - started_ns) // 1000
    started_ns = services.world.monotonic_ns()
    await services.redis.ping()
    valkey_us = (services.world.monotonic_ns() - started_ns) // 1000
    limits = await limits_in_use(services.quota, [tenant.limits for tenant in tenants])

    engine = services.engine.status
    blocks = engine.stats.blocks_by_domain if engine.stats is not None else {}
    rows = tuple(
        TenantFigures(
            tenant_id=t.tenant_id,
            name=t.name,
            status=t.status,
            num_requests=t.num_requests,
            num_prompt_tokens=t.num_prompt_tokens,
            num_cached_tokens=t.num_cached_tokens,
            num_completion_tokens=t.num_completion_tokens,
            money={t.currency: Money(t.billed_nano_usd, t.held_nano_usd, t.credit_nano_usd)},
            num_blocks=blocks.get(t.tenant_id, 0),  # a tenant's domain in the engine is its id
            limits=limits[t.tenant_id],
            minutes=minutes.get(t.tenant_id) or empty_minutes(now_ns),
        )
        for t in tenants
    )
    total = add_up(rows, now_ns)
    settings = services.settings
    facts = {
        "audit": health.audit_fact(
            heartbeat, num_violations, engine, heartbeat_interval_s=settings.heartbeat_interval_s, now_ns=now_ns
        ),
        "worker": health.worker_fact(engine, worker_started, sum(blocks.values()) - total.num_blocks, now_ns),
        "log": health.log_fact(log, checkpoint_interval_ms=settings.checkpoint_interval_ms, now_ns=now_ns),
        "stores": health.stores_fact(
            "SQLite" if services.database.is_sqlite else "PostgreSQL", database_us, valkey_us, services.standing.seen
        ),
    }
    return Overview(now_ns, period, since_ns, rows, total, facts)


async def gather_minutes(
    conn: AsyncConnection, now_ns: int, tenant_id: str | None = None
) -> dict[str, tuple[Bar, ...]]:
    """Per tenant, the last NUM_MINUTES minutes up to and with the running one."""
    first_ns = _first_minute_ns(now_ns)
    sums = await queries.minute_sums(conn, first_ns, now_ns + 1, MINUTE_NS, tenant_id)
    found = {}
    for owner, minutes in sums.items():
        bars = list(empty_minutes(now_ns))
        for m in minutes:
            bars[m.minute] = Bar(
                label=bars[m.minute].label,
                completion=m.num_completion_tokens,
                prompt=m.num_prompt_tokens - m.num_cached_tokens,
                cached=m.num_cached_tokens,
            )
        found[owner] = tuple(bars)
    return found


def empty_minutes(now_ns: int) -> tuple[Bar, ...]:
    first_ns = _first_minute_ns(now_ns)
    return tuple(Bar(utc_minute(first_ns + i * MINUTE_NS)) for i in range(NUM_MINUTES))


def add_up(rows: Sequence[TenantFigures], now_ns: int) -> TenantFigures:
    """The totals row: the sum of exactly these rows; of money, one for each currency, by its name."""
    money: dict[str, Money] = {}
    for currency in sorted({one for row in rows for one in row.money}):
        parts = [row.money[currency] for row in rows if currency in row.money]
        money[currency] = Money(*(sum(getattr(part, name) for part in parts) for name in Money.__slots__))
    minutes = tuple(
        Bar(
            empty.label,
            sum(row.minutes[i].completion for row in rows),
            sum(row.minutes[i].prompt for row in rows),
            sum(row.minutes[i].cached for row in rows),
        )
        for i, empty in enumerate(empty_minutes(now_ns))
    )
    return TenantFigures(
        tenant_id="",
        name="",
        status="",
        num_requests=sum(row.num_requests for row in rows),
        num_prompt_tokens=sum(row.num_prompt_tokens for row in rows),
        num_cached_tokens=sum(row.num_cached_tokens for row in rows),
        num_completion_tokens=sum(row.num_completion_tokens for row in rows),
        money=money,
        num_blocks=sum(row.num_blocks for row in rows),
        limits={},
        minutes=minutes,
    )


def _first_minute_ns(now_ns: int) -> int:
    return (now_ns // MINUTE_NS - NUM_MINUTES + 1) * MINUTE_NS
