"""The overview's figures: one database snapshot, one look at Valkey, the engine's last report.

The total is added up from the very rows that are shown, so it cannot say anything else than their sum.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from gateway.admin import audit_queries, health
from gateway.admin.chart import Bar
from gateway.admin.wording import NS_PER_S, count, utc, utc_minute
from gateway.services import Services

CURRENCY = "USD"
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
class LimitUse:
    used: int
    maximum: int | None  # None: no limit

    def text(self) -> str:
        return f"{count(self.used)} of {count(self.maximum)}" if self.maximum is not None else "no limit"

    def percent(self) -> int:
        return min(100, self.used * 100 // self.maximum) if self.maximum else 0


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
    billed_nano_usd: int
    held_nano_usd: int
    credit_nano_usd: int  # what is left to spend: neither billed nor held
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
