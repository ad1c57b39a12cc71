"""Whether all books agree, what tenants were charged as a FOCUS file, and what is left over: for reading."""

import asyncio
from functools import partial
from typing import Any

from engine.journal import read_journals
from gateway.api.problems import InvalidRequestError
from gateway.billing.focus import focus_rows, write_focus
from gateway.billing.press import MEDIA_TYPES
from gateway.billing.reconcile import reconcile
from gateway.host.folders import journal_of
from gateway.operators.desk import NANO_MAX, NS_MAX, Ask, FileAnswer
from gateway.records.books import margin_record
from gateway.records.plain import record
from gateway.sequences import usage_by_request
from tenancy.access.directory import list_tenants
from tenancy.accounts.posting import CURRENCY, require_currency
from tenancy.invoicing.periods import DAY_NS, period_start_ns


async def reconciliation(ask: Ask) -> Any:
    """Of the UTC day that ``day_ns`` is in; left out: yesterday. Against the journals of this gateway's workers."""
    yesterday_ns = period_start_ns("day", ask.now_ns) - DAY_NS
    since_ns = period_start_ns("day", ask.query.number("day_ns", yesterday_ns, 0, NS_MAX))
    ask.query.end()
    folder = journal_of(ask.services.settings.data_dir)
    journals = usage_by_request(await asyncio.to_thread(read_journals, folder))
    return record(await reconcile(ask.conn, journals, since_ns, since_ns + DAY_NS))


async def focus(ask: Ask) -> Any:
    """What was charged in [``since_ns``, ``until_ns``), of one tenant with its id as ``tenant_id``."""
    since_ns, until_ns = _period(ask)
    only = ask.id_of("tenant_id")
    ask.query.end()
    tenants = [await ask.tenant(only)] if only else await list_tenants(ask.conn)
    rows = [row async for row in focus_rows(ask.conn, tenants, since_ns, until_ns)]
    return FileAnswer(partial(asyncio.to_thread, write_focus, rows), MEDIA_TYPES["csv"], "focus.csv")


async def margin(ask: Ask) -> Any:
    """Of [``since_ns``, ``until_ns``) at ``cost_per_hour_nano_usd`` in ``currency``."""
    since_ns, until_ns = _period(ask)
    rate = ask.query.number("cost_per_hour_nano_usd", -1, 0, NANO_MAX)
    currency = require_currency(ask.query.text("currency") or CURRENCY)
    ask.query.end()
    if rate < 0:
        raise InvalidRequestError("cost_per_hour_nano_usd is missing", "cost_per_hour_nano_usd")
    block_size = ask.services.settings.block_size
    return await margin_record(
        ask.conn, since_ns, until_ns, rate_nano_usd=rate, currency=currency, block_size=block_size
    )


def _period(ask: Ask) -> tuple[int, int]:
    """Up to now at the latest. Raises InvalidRequestError."""
    since_ns, until_ns = (ask.query.number(name, -1, 0, NS_MAX) for name in ("since_ns", "until_ns"))
    until_ns = min(until_ns, ask.now_ns)  # later days have nothing yet
    if not 0 <= since_ns < until_ns:
        raise InvalidRequestError("a period needs since_ns, and a later until_ns, that has begun", "since_ns")
    return since_ns, until_ns


READING = (
    ("GET", "/books/reconciliation", reconciliation),
    ("GET", "/books/focus", focus),
    ("GET", "/books/margin", margin),
)
WRITING: tuple[tuple[str, str, type[Any], Any], ...] = ()
