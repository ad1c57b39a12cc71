"""The periods of a budget: UTC, half-open [start, end). `total` has one, from the epoch and without an end."""

from datetime import UTC, datetime
from typing import Final, Literal, get_args

Period = Literal["day", "month", "total"]
PERIODS: Final[tuple[Period, ...]] = get_args(Period)
SECOND_NS: Final = 1_000_000_000
DAY_NS: Final = 86_400 * SECOND_NS  # UTC here is POSIX time: it has no leap seconds


def period_start_ns(period: Period, at_ns: int) -> int:
    """When the period that `at_ns` lies in began, both in ns since the epoch."""
    if period == "total":
        return 0
    if period == "day":
        return at_ns - at_ns % DAY_NS
    day = datetime.fromtimestamp(at_ns // SECOND_NS, UTC)
    return _ns(datetime(day.year, day.month, 1, tzinfo=UTC))


def period_end_ns(period: Period, at_ns: int) -> int | None:
    """The first instant after the period that `at_ns` lies in; None for `total`."""
    if period == "total":
        return None
    if period == "day":
        return period_start_ns("day", at_ns) + DAY_NS
    day = datetime.fromtimestamp(at_ns // SECOND_NS, UTC)
    year, month = (day.year + 1, 1) if day.month == 12 else (day.year, day.month + 1)
    return _ns(datetime(year, month, 1, tzinfo=UTC))


def _ns(day: datetime) -> int:
    return int(day.timestamp()) * SECOND_NS
