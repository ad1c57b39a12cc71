"""What a tenant was billed in a period, as lines, from the ledger and the usage rows that explain it.

    usage        captures of the period by model, tier, price, step and kind of token; one line each for
                 `cached_input`, `input`, `output`, `request` (fees), and `rounding`: each request was rounded once,
                 so the lines miss the ledger by less than a nano-unit a request; the line says by how much
    promotional  what promotional credit covered: a discount
    refund       given back of captures of the same period, while it ran
    adjustment   given or taken by hand, unless it only corrects a grant

    sum of exact_nano over usage and refund lines = what the revenue account gained in the period by them: exactly

Periods are half-open, [since, until), by the time of the ledger transaction. Refunds that come later belong to the
credit note of the invoice that billed the capture.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, case, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.money import PICO_PER_NANO, pico_to_nano
from tenancy.pricing.price_book import get_price
from tenancy.pricing.prices import Part, Price, parts_of
from tenancy.usage.meter import Usage

KINDS: Final = (
    "input",
    "cached_input",
    "output",
    "request",
    "rounding",
    "unexplained",
    "promotional",
    "refund",
    "adjustment",
)
ROWS_AT_ONCE: Final = 1_000


@dataclass(frozen=True, slots=True)
class Line:
    """`exact_nano` of what `quantity` units cost, at `unit_pico` each and `percent` of that. Below zero: a credit."""

    kind: str
    exact_nano: int
    quantity: int = 0
    model: str = ""
    tier: str = ""
    price_id: str = ""
    step: int = 0
    unit_pico: int = 0
    percent: int = 100
    project_id: str = ""
    note: str = ""  # of a refund or adjustment: its reason


async def usage_lines(
    conn: AsyncConnection, tenant_id: str, since_ns: int, until_ns: int, *, by_project: bool = False
) -> list[Line]:
    """The captures of [since_ns, until_ns); with `by_project` each line is one project's."""
    sums: dict[tuple[str, ...], _Sums] = defaultdict(_Sums)
    query = _captures(tenant_id, since_ns, until_ns)
    key = (_USAGE.c.model, _USAGE.c.tier, _USAGE.c.price_id, *((_USAGE.c.project_id,) if by_project else ()))
    grouped = query.with_only_columns(
        *key,
        func.count(),
        func.sum(_USAGE.c.num_prompt_tokens - _USAGE.c.num_cached_tokens),
        func.sum(_USAGE.c.num_cached_tokens),
        func.sum(_USAGE.c.num_completion_tokens),
        func.sum(_ENTRY.c.amount_nano_usd),
    ).group_by(*key)
    lines: list[Line] = []
    num_keys = len(key)
    for row in (await conn.execute(grouped)).all():
        names = tuple(name or "" for name in row[:num_keys])
        count, *tokens, nano = (int(figure or 0) for figure in row[num_keys:])
        model, tier, price_id, project_id = (*names, "")[:4]
        if not price_id:  # captured, and no usage row says for what: reconciliation tells
            lines.append(Line("unexplained", nano, count, project_id=project_id))
            continue
        price = await get_price(conn, price_id)
        one = sums[names]
        one.num_requests, one.nano = count, nano
        if price.steps:
            where = (_USAGE.c.model == model, _USAGE.c.tier == tier, _USAGE.c.price_id == price_id)
            mine = (*where, _USAGE.c.project_id == project_id) if by_project else where
            await _add_stepped(conn, query.where(*mine), price, one)
        else:
            uncached, cached, completion = tokens
            for part in parts_of(price, Usage(uncached + cached, cached, completion)):
                one.add(part)
        lines += one.lines(price, tier, project_id)
    rounding: dict[str, int] = defaultdict(int)
    for line in lines:
        if line.kind == "rounding":
            rounding[line.project_id] += line.exact_nano
    kept = [line for line in lines if line.kind != "rounding"]
    kept += [Line("rounding", nano, project_id=name) for name, nano in sorted(rounding.items()) if nano]
    return sorted(kept, key=_order)


async def other_lines(conn: AsyncConnection, tenant_id: str, since_ns: int, until_ns: int) -> list[Line]:
    """Promotional credit, refunds and adjustments of an invoice's period."""
    used = await credit_used(conn, tenant_id, since_ns, until_ns, "promotional")
    promotional = [Line("promotional", -used)] if used else []
    refunds = await refund_lines(conn, tenant_id, (since_ns, until_ns), (since_ns, until_ns))
    query = _adjustments(tenant_id, since_ns, until_ns).with_only_columns(
        _T.c.memo, -_ENTRY.c.amount_nano_usd, _T.c.created_ns, _T.c.id
    )
    rows = (await conn.execute(query.order_by(_T.c.created_ns, _T.c.id))).all()
    return [*promotional, *refunds, *(Line("adjustment", int(row[1]), 1, note=row[0]) for row in rows)]


async def refund_lines(
    conn: AsyncConnection, tenant_id: str, captured: tuple[int, int], refunded: tuple[int, int]
) -> list[Line]:
    """Refunds posted in the period `refunded` of requests that were captured in the period `captured`."""
    query = _refunds(tenant_id, captured, refunded).with_only_columns(
        _T.c.memo, -_ENTRY.c.amount_nano_usd, _USAGE.c.model, _USAGE.c.tier, _USAGE.c.price_id, _USAGE.c.project_id
    )
    rows = (await conn.execute(query.order_by(_T.c.created_ns, _T.c.id))).all()
    return [
        Line("refund", int(nano), 1, model or "", tier or "", price_id or "", project_id=project_id or "", note=memo)
        for memo, nano, model, tier, price_id, project_id in rows
    ]


async def credit_used(conn: AsyncConnection, tenant_id: str, since_ns: int, until_ns: int, kind: str) -> int:
    """What an invoice's captures, refunds and adjustments took of credits of this kind, in nano-units."""
    period = (since_ns, until_ns)
    total = 0
    for query in (
        _captures(tenant_id, since_ns, until_ns),
        _refunds(tenant_id, period, period),
        _adjustments(tenant_id, since_ns, until_ns),
    ):
        total += await _used(conn, query, kind)
    return total


async def credit_used_by_refunds(
    conn: AsyncConnection, tenant_id: str, captured: tuple[int, int], refunded: tuple[int, int], kind: str
) -> int:
    """The same of a credit note's refunds: below zero, since they give back."""
    return await _used(conn, _refunds(tenant_id, captured, refunded), kind)


async def _used(conn: AsyncConnection, query: Select[Any], kind: str) -> int:
    use, credit = tables.credit_use, tables.credit
    ids = query.with_only_columns(_T.c.id).scalar_subquery()
    total = await conn.scalar(
        select(func.coalesce(func.sum(use.c.amount_nano_usd), 0))
        .join(credit, credit.c.id == use.c.credit_id)
        .where(use.c.transaction_id.in_(ids), credit.c.kind == kind)
    )
    return int(total or 0)


async def _add_stepped(conn: AsyncConnection, query: Select[Any], price: Price, sums: "_Sums") -> None:
    """Row by row: where a request stands on the steps is its own."""
    columns = query.with_only_columns(
        _USAGE.c.num_prompt_tokens,
        _USAGE.c.num_cached_tokens,
        _USAGE.c.num_completion_tokens,
        _USAGE.c.num_tokens_before,
    )
    async with conn.stream(columns.execution_options(yield_per=ROWS_AT_ONCE)) as rows:
        async for *tokens, before in rows:
            for part in parts_of(price, Usage(*tokens), before):
                sums.add(part)


class _Sums:
    """Of the requests of one model, tier and price."""

    def __init__(self) -> None:
        self.num_requests = self.nano = 0
        self.parts: dict[tuple[str, int, int], int] = defaultdict(int)

    def add(self, part: Part) -> None:
        self.parts[part.kind, part.step, part.token_pico_usd] += part.num_tokens

    def lines(self, price: Price, tier: str, project_id: str) -> list[Line]:
        percent = price.percent(tier)

        def line(kind: str, quantity: int, step: int, unit_pico: int) -> Line:
            nano = pico_to_nano(quantity * unit_pico, percent)
            return Line(kind, nano, quantity, price.model, tier, price.price_id, step, unit_pico, percent, project_id)

        lines = [line(kind, count, step, pico) for (kind, step, pico), count in self.parts.items()]
        if price.request_nano_usd:
            lines.append(line("request", self.num_requests, 0, price.request_nano_usd * PICO_PER_NANO))
        left = self.nano - sum(one.exact_nano for one in lines)
        return [*lines, Line("rounding", left, project_id=project_id)]


def _order(line: Line) -> tuple[Any, ...]:
    last = line.kind in ("rounding", "unexplained")
    return (last, line.project_id, line.model, line.tier, line.price_id, line.step, KINDS.index(line.kind))


def _captures(tenant_id: str, since_ns: int, until_ns: int) -> Select[Any]:
    return (
        select(_T.c.id)
        .join(_ENTRY, (_ENTRY.c.transaction_id == _T.c.id) & (_ENTRY.c.amount_nano_usd >= 0))
        .join(_ACCOUNT, (_ACCOUNT.c.id == _ENTRY.c.account_id) & (_ACCOUNT.c.kind == "revenue"))
        .join(_HOLD, _HOLD.c.id == _T.c.hold_id)
        .outerjoin(_USAGE, _USAGE.c.request_id == _HOLD.c.request_id)
        .where(_T.c.kind == "captured", *_within(_T.c, tenant_id, since_ns, until_ns))
    )


def _refunds(tenant_id: str, captured: tuple[int, int], refunded: tuple[int, int]) -> Select[Any]:
    old = _T.alias("old")
    return (
        select(_T.c.id)
        .join(_ENTRY, _ENTRY.c.transaction_id == _T.c.id)
        .join(_ACCOUNT, (_ACCOUNT.c.id == _ENTRY.c.account_id) & (_ACCOUNT.c.kind == "credit"))
        .join(old, old.c.id == _T.c.corrects_id)
        .join(_HOLD, _HOLD.c.id == old.c.hold_id)
        .outerjoin(_USAGE, _USAGE.c.request_id == _HOLD.c.request_id)
        .where(
            _T.c.kind == "refund",
            *_within(_T.c, tenant_id, *refunded),
            old.c.created_ns >= captured[0],
            old.c.created_ns < captured[1],
        )
    )


def _adjustments(tenant_id: str, since_ns: int, until_ns: int) -> Select[Any]:
    old = _T.alias("old")
    return (
        select(_T.c.id)
        .join(_ENTRY, _ENTRY.c.transaction_id == _T.c.id)
        .join(_ACCOUNT, (_ACCOUNT.c.id == _ENTRY.c.account_id) & (_ACCOUNT.c.kind == "credit"))
        .outerjoin(old, old.c.id == _T.c.corrects_id)
        .where(
            _T.c.kind == "adjustment",
            *_within(_T.c, tenant_id, since_ns, until_ns),
            case((old.c.kind.in_(("grant", "expiry")), 1), else_=0) == 0,
        )
    )


def _within(columns: Any, tenant_id: str, since_ns: int, until_ns: int) -> tuple[ColumnElement[bool], ...]:
    return columns.tenant_id == tenant_id, columns.created_ns >= since_ns, columns.created_ns < until_ns


_T: Final = tables.ledger_transaction
_ENTRY: Final = tables.ledger_entry
_ACCOUNT: Final = tables.account
_HOLD: Final = tables.hold
_USAGE: Final = tables.usage_record
