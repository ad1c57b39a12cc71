"""Who sells and who is billed, invoices and credit notes, their files and payments."""

from functools import partial
from typing import Annotated, Any

from msgspec import Meta, Struct

from gateway.billing.press import MEDIA_TYPES
from gateway.operators.desk import NANO_MAX, Ask, FileAnswer, Id, Nothing, Ns, Text, Why
from gateway.operators.refusals import there, written
from gateway.organization.desk import PAGE_DEFAULT, PAGE_MAX, listed
from gateway.records.invoices import FILE_KINDS, file_of, invoice_record, payments_record
from gateway.records.plain import Record, record
from tenancy.access.directory import list_tenants
from tenancy.invoicing.invoices import Invoice, get_invoice, list_invoices
from tenancy.invoicing.parties import (
    NAME_MAX,
    PAYMENT_DAYS_MAX,
    PREFIX_MAX,
    TAX_ID_MAX,
    TAX_RATE_BP_MAX,
    TEXT_MAX,
    Buyer,
    PartyError,
    Terms,
    find_issuer,
    get_buyer,
    get_issuer,
)

_TEXT = r"\A[^\x00]*\Z"
PartyName = Annotated[str, Meta(min_length=1, max_length=NAME_MAX, pattern=_TEXT)]
Lines = Annotated[str, Meta(max_length=TEXT_MAX, pattern=_TEXT)]
TaxId = Annotated[str, Meta(max_length=TAX_ID_MAX, pattern=_TEXT)]
Prefix = Annotated[str, Meta(min_length=1, max_length=PREFIX_MAX, pattern=_TEXT)]


class NewIssuer(Struct, frozen=True, forbid_unknown_fields=True):
    name: PartyName
    address: Lines = ""
    tax_id: TaxId = ""
    payment_details: Lines = ""
    payment_days: Annotated[int, Meta(ge=0, le=PAYMENT_DAYS_MAX)] = 30


class NewBuyer(Struct, frozen=True, forbid_unknown_fields=True):
    number_prefix: Prefix  # of the issuer
    terms: Terms
    name: PartyName | None = None  # left out: the tenant's
    address: Lines = ""
    tax_id: TaxId = ""
    tax_rate_bp: Annotated[int, Meta(ge=0, le=TAX_RATE_BP_MAX)] = 0


class NewInvoice(Struct, frozen=True, forbid_unknown_fields=True):
    """Of [since_ns, until_ns)."""

    tenant_id: Id
    until_ns: Ns
    since_ns: Ns | None = None  # left out: where the last one ended


class NewPayment(Struct, frozen=True, forbid_unknown_fields=True):
    payment_id: Id
    amount_minor: Annotated[int, Meta(ge=1, le=NANO_MAX)] | None = None  # left out: all that is open
    reference: Text = ""


async def issuer(ask: Ask) -> Any:
    ask.query.end()
    return record(await _issuer(ask, ask.path["number_prefix"]))


async def set_issuer(ask: Ask, wanted: NewIssuer) -> Any:
    with written():
        made = await ask.bookkeeper.set_issuer(
            ask.path["number_prefix"],
            name=wanted.name,
            address=wanted.address,
            tax_id=wanted.tax_id,
            payment_details=wanted.payment_details,
            payment_days=wanted.payment_days,
        )
    return record(made)


async def buyer(ask: Ask) -> Any:
    ask.query.end()
    tenant_id = (await ask.tenant()).tenant_id
    with there():
        found = await get_buyer(ask.conn, tenant_id)
    return record(found) | {"number_prefix": (await get_issuer(ask.conn, found.issuer_id)).number_prefix}


async def set_buyer(ask: Ask, wanted: NewBuyer) -> Any:
    one = await ask.tenant()
    sells = await _issuer(ask, wanted.number_prefix)
    rest = (wanted.address, wanted.tax_id, wanted.tax_rate_bp, wanted.terms)
    with written():
        billed = Buyer(one.tenant_id, sells.issuer_id, wanted.name or one.name, *rest)
    await ask.bookkeeper.set_buyer(billed)
    return await buyer(ask)


async def invoices(ask: Ask) -> Any:
    """The newest first; of one tenant with its id as ``tenant_id``."""
    only = ask.id_of("tenant_id")
    after, limit = ask.id_of("after"), ask.query.number("limit", PAGE_DEFAULT, 1, PAGE_MAX)
    ask.query.end()
    tenant_id = (await ask.tenant(only)).tenant_id if only else None
    before = await _invoice(ask, after) if after else None
    found = await list_invoices(ask.conn, tenant_id, before=before, limit=limit + 1)
    names = {one.tenant_id: one.name for one in await list_tenants(ask.conn)}
    page = [await invoice_record(ask.conn, one, names[one.tenant_id]) for one in found[:limit]]
    return listed(page, [one["invoice_id"] for one in page], len(found) > limit)


async def invoice(ask: Ask) -> Any:
    ask.query.end()
    return await _record(ask, await _invoice(ask, ask.path["invoice_id"]))


async def draft(ask: Ask, wanted: NewInvoice) -> Any:
    one = await ask.tenant(wanted.tenant_id)
    return await _record(ask, await ask.bookkeeper.draft(one.tenant_id, wanted.since_ns, wanted.until_ns))


async def draft_credit_note(ask: Ask, _: Nothing) -> Any:
    of = await _invoice(ask, ask.path["invoice_id"])
    return await _record(ask, await ask.bookkeeper.draft_credit_note(of.invoice_id))


async def issue(ask: Ask, _: Nothing) -> Any:
    """A repeat changes nothing."""
    await ask.bookkeeper.issue((await _invoice(ask, ask.path["invoice_id"])).invoice_id)
    return await invoice(ask)


async def void(ask: Ask, why: Why) -> Any:
    """A repeat with the same reason changes nothing."""
    await ask.bookkeeper.void((await _invoice(ask, ask.path["invoice_id"])).invoice_id, why.reason)
    return await invoice(ask)


async def file(ask: Ask) -> Any:
    """As ``format``: pdf (the default), csv or json; of an issued one the same bytes each time."""
    asked = ask.query.text("format", FILE_KINDS) or "pdf"
    ask.query.end()
    kind = next(one for one in FILE_KINDS if one == asked)
    one = await _invoice(ask, ask.path["invoice_id"])
    made = partial(ask.press.make, await file_of(ask.conn, one), kind)
    return FileAnswer(made, MEDIA_TYPES[kind], f"{one.invoice_id}.{kind}")


async def payments(ask: Ask) -> Any:
    ask.query.end()
    return await payments_record(ask.conn, (await _invoice(ask, ask.path["invoice_id"])).invoice_id)


async def pay(ask: Ask, wanted: NewPayment) -> Any:
    """Note a payment of an invoice, or that a credit note was paid out. A repeat changes nothing."""
    one = await _invoice(ask, ask.path["invoice_id"])
    await ask.bookkeeper.pay(
        one.invoice_id, wanted.reference, amount_minor=wanted.amount_minor, payment_id=wanted.payment_id
    )
    return await payments(ask)


async def _issuer(ask: Ask, number_prefix: str) -> Any:
    found = await find_issuer(ask.conn, number_prefix)
    with there():
        if found is None:
            raise PartyError(f"there is no issuer with the prefix {number_prefix!r}")
    return found


async def _invoice(ask: Ask, invoice_id: str) -> Invoice:
    with there():
        return await get_invoice(ask.conn, invoice_id)


async def _record(ask: Ask, one: Invoice) -> Record:
    return await invoice_record(ask.conn, one, (await ask.tenant(one.tenant_id)).name)


READING = (
    ("GET", "/issuers/{number_prefix}", issuer),
    ("GET", "/tenants/{tenant_id}/buyer", buyer),
    ("GET", "/invoices", invoices),
    ("GET", "/invoices/{invoice_id}", invoice),
    ("GET", "/invoices/{invoice_id}/file", file),
    ("GET", "/invoices/{invoice_id}/payments", payments),
)
WRITING: tuple[tuple[str, str, type[Struct], Any], ...] = (
    ("PUT", "/issuers/{number_prefix}", NewIssuer, set_issuer),
    ("PUT", "/tenants/{tenant_id}/buyer", NewBuyer, set_buyer),
    ("POST", "/invoices", NewInvoice, draft),
    ("POST", "/invoices/{invoice_id}/credit_note", Nothing, draft_credit_note),
    ("POST", "/invoices/{invoice_id}/issue", Nothing, issue),
    ("POST", "/invoices/{invoice_id}/void", Why, void),
    ("POST", "/invoices/{invoice_id}/payments", NewPayment, pay),
)
