"""Prices, credits and budgets as commands with ``--json`` and routes show them."""

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.records.plain import Record, record
from tenancy.accounts.budget_use import budget_uses
from tenancy.accounts.credit_line import CreditLine
from tenancy.accounts.credits import list_credits
from tenancy.accounts.posting import currency_of
from tenancy.pricing.price_book import PriceTerms, list_book, list_drafts


async def price_records(conn: AsyncConnection, now_ns: int, model: str = "") -> list[Record]:
    """Drafts, then the book: each price with its state and the interval in which it is in force."""
    drafts = [one for one in await list_drafts(conn) if model in ("", one.terms.model)]
    book = await list_book(conn, now_ns, model or None)
    return [
        *(price_record(one.terms, one.draft_id, "draft", None, None) for one in drafts),
        *(
            price_record(
                PriceTerms.of(one.price), one.price.price_id, one.state, one.price.effective_from_ns, one.until_ns
            )
            for one in book
        ),
    ]


def price_record(
    terms: PriceTerms, name: str, state: str, effective_from_ns: int | None, until_ns: int | None
) -> Record:
    place = {"id": name, "state": state, "effective_from_ns": effective_from_ns, "until_ns": until_ns}
    return place | record(terms)


async def credit_records(conn: AsyncConnection, tenant_id: str, now_ns: int) -> list[Record]:
    """What the tenant's credit is made of, in the order in which it is used."""
    currency = await currency_of(conn, tenant_id)
    return [record(one) | {"currency": currency} for one in await list_credits(conn, tenant_id, now_ns)]


def line_record(tenant_id: str, line: CreditLine | None, currency: str) -> Record:
    """Of a tenant that is pre-paid the limit is 0."""
    line = line or CreditLine(tenant_id, 0, 0, 0)
    return record(line) | {"drawn_nano_usd": line.drawn_nano_usd, "currency": currency}


async def budget_records(conn: AsyncConnection, tenant_id: str, now_ns: int) -> list[Record]:
    """With what is used and held in the period that runs."""
    currency = await currency_of(conn, tenant_id)
    return [record(one) | {"currency": currency} for one in await budget_uses(conn, tenant_id, now_ns)]
