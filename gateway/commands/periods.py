"""How commands read instants and periods: UTC days, or ISO 8601 with an offset."""

from datetime import UTC, date, datetime

from gateway.commands.session import CommandError

NS_PER_S = 10**9


def instant_of(text: str, option: str) -> int:
    """A UTC day's first instant, or an instant with an offset, in ns since the epoch."""
    try:
        if len(text) == len("2027-01-31"):
            day = date.fromisoformat(text)
            return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * NS_PER_S
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise CommandError(f"{option} {text!r} is neither a day (2027-01-31) nor an ISO 8601 date and time") from error
    if at.tzinfo is None:
        raise CommandError(f"{option} {text!r} has no offset from UTC: add Z")
    return int(at.timestamp()) * NS_PER_S


def month_of(text: str) -> tuple[int, int]:
    """[first instant, first instant of the next month) of a month such as 2027-01, UTC."""
    try:
        first = datetime.strptime(text, "%Y-%m").replace(tzinfo=UTC)
    except ValueError as error:
        raise CommandError(f"--month {text!r} is not a month such as 2027-01") from error
    year, month = (first.year + 1, 1) if first.month == 12 else (first.year, first.month + 1)
    return int(first.timestamp()) * NS_PER_S, int(datetime(year, month, 1, tzinfo=UTC).timestamp()) * NS_PER_S


def period_of(month: str, since: str, until: str) -> tuple[int | None, int]:
    """From the options --month, or --since and --until; None: --since was left out."""
    if month:
        if since or until:
            raise CommandError("give --month, or --since and --until, not both")
        return month_of(month)
    if not until:
        raise CommandError("give --month, or --until with or without --since")
    return (instant_of(since, "--since") if since else None), instant_of(until, "--until")
