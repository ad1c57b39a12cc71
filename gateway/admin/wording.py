"""How figures read on the page: exact, with units, the same in the HTML and in the live updates."""

from datetime import UTC, datetime

from tenancy.money import format_nano

NS_PER_S = 10**9
DECIMALS_MAX = 9  # of an amount in nano-units
FIGURE_SPACE = "\u2007"  # as wide as a digit, and HTML does not collapse it


def count(value: int) -> str:
    return f"{value:,}"


def in_column(nano: int, currency: str) -> str:
    """format_nano, filled up with figure spaces so that decimal points stand under each other."""
    text = format_nano(nano, currency)
    return text + FIGURE_SPACE * (DECIMALS_MAX - len(text.partition(".")[2]))


def utc(at_ns: int) -> str:
    """`2026-11-23 18:44:05 UTC`."""
    return _datetime(at_ns).strftime("%Y-%m-%d %H:%M:%S UTC")


def moment(at_ns: int, now_ns: int) -> str:
    """`18:44:05 UTC` today, with its date on other days."""
    text = utc(at_ns)
    return text[11:] if text[:10] == utc(now_ns)[:10] else text


def utc_minute(at_ns: int) -> str:
    """`18:44`, for axes and chart titles."""
    return _datetime(at_ns).strftime("%H:%M")


def duration(duration_ns: int) -> str:
    """The two largest units of a duration: `4 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`. Never negative."""
    seconds = max(0, duration_ns) // NS_PER_S
    days, seconds = divmod(seconds, 86_400)
    hours, seconds = divmod(seconds, 3_600)
    minutes, seconds = divmod(seconds, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {seconds} s"
    return f"{seconds} s"


def milliseconds(duration_ns: int | None) -> str:
    """`12.3`, or a dash where nobody knows."""
    return "-" if duration_ns is None else f"{duration_ns / 1e6:,.1f}"


def plural(value: int, singular: str, plural_form: str = "") -> str:
    """`1 leaf`, `2 leaves`."""
    return f"{value:,} {singular if value == 1 else plural_form or singular + 's'}"


def _datetime(at_ns: int) -> datetime:
    return datetime.fromtimestamp(at_ns // NS_PER_S, tz=UTC)
