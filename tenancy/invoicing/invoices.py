"""Invoices and credit notes: what a period was billed, numbered without gaps, never changed once issued.

    draft -> issued -> paid | void          draft -> void (it had no number)

An issued document is paid when its payments add up to what is due; until the first one it can be voided (endings.py).
A draft is a period; its figures are read from the ledger each time, so that a preview shows what would be issued. At
issue the issuer's next number is taken and the document is stored, append-only, in one transaction. PDF, CSV and JSON
are functions of the document alone, so they can be made again, byte for byte. A post-paid tenant's documents also move
its receivable, when they are issued, paid and voided (credit_line.py).

Which document bills what (each thing is on exactly one):
- an invoice bills its tenant's captures, refunds of them and adjustments in [since, until); a tenant's invoices that
  are not void never overlap;
- a credit note gives back what was refunded of its invoice's captures after that, in [since, until) of its own.

A period can be issued once it is over, SETTLE_NS have passed and none of its holds is pending: from then on nothing can
be captured in it, because a capture needs a hold that was placed before it. SETTLE_NS is longer than any transaction
and than replicas' clocks are apart. A credit note's period ends SETTLE_NS before it is drafted at the latest.
"""

import json
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.accounts import credit_line
from tenancy.accounts.posting import currency_of
from tenancy.ids import Entropy, new_id
from tenancy.invoicing import billed_lines
from tenancy.invoicing.billed_lines import Line
from tenancy.invoicing.invoice_document import NANO, Heading, canonical, digest, make_document, minor_digits
from tenancy.invoicing.invoice_tables import invoice as _INVOICE
from tenancy.invoicing.invoice_tables import invoice_document as _DOCUMENT
from tenancy.invoicing.parties import Buyer, Issuer, get_buyer, get_issuer, take_number
from tenancy.invoicing.periods import DAY_NS, SECOND_NS

SETTLE_NS: Final = 300 * SECOND_NS
LIST_MAX: Final = 1_000
InvoiceKind = Literal["invoice", "credit_note"]
State = Literal["draft", "issued", "paid", "void"]
MOVES: Final[dict[State, tuple[State, ...]]] = {
    "draft": ("issued", "void"),
    "issued": ("paid", "void"),
    "paid": (),
    "void": (),
}


class InvoiceError(ValueError):
    """The invoice cannot be made, or not be moved to that state; the message says why."""


@dataclass(frozen=True, slots=True)
class Invoice:
    invoice_id: str
    issuer_id: str
    tenant_id: str
    kind: InvoiceKind
    corrects_id: str | None
    state: State
    since_ns: int
    until_ns: int
    created_ns: int
    issued_ns: int | None
    due_ns: int | None
    ended_ns: int | None
    end_note: str | None


@dataclass(frozen=True, slots=True)
class Document:
    """An issued document as it is stored; `text` is its canonical JSON."""

    invoice_id: str
    number: int
    text: str
    sha256: str

    @property
    def figures(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads(self.text)
        return read


async def draft_invoice(
    conn: AsyncConnection, tenant_id: str, *, since_ns: int | None, until_ns: int, entropy: Entropy, now_ns: int
) -> Invoice:
    """`since_ns` None: where the last invoice ended, or the tenant began. Raises InvoiceError or PartyError."""
    buyer = await get_buyer(conn, tenant_id, lock=True)
    if since_ns is None:
        since_ns = await _next_start(conn, tenant_id)
    if since_ns >= until_ns:
        raise InvoiceError(f"a period ends after it begins: [{since_ns}, {until_ns})")
    taken = await conn.scalar(
        select(_INVOICE.c.id).where(
            _INVOICE.c.tenant_id == tenant_id,
            _INVOICE.c.kind == "invoice",
            _INVOICE.c.state != "void",
            _INVOICE.c.since_ns < until_ns,
            _INVOICE.c.until_ns > since_ns,
        )
    )
    if taken is not None:
        raise InvoiceError(f"the period overlaps that of {taken}: void it first, or leave --since out")
    return await _add(conn, buyer.issuer_id, tenant_id, "invoice", None, (since_ns, until_ns), entropy, now_ns)


async def draft_credit_note(conn: AsyncConnection, invoice_id: str, *, entropy: Entropy, now_ns: int) -> Invoice:
    """Of what was refunded of an issued invoice since its end or its last credit note. Raises InvoiceError."""
    of = await get_invoice(conn, invoice_id)
    await get_buyer(conn, of.tenant_id, lock=True)
    of = await get_invoice(conn, invoice_id)
    if of.kind != "invoice" or of.state not in ("issued", "paid"):
        raise InvoiceError(f"{invoice_id} is no issued invoice: a draft changes by itself")
    last = await conn.scalar(
        select(func.max(_INVOICE.c.until_ns)).where(_INVOICE.c.corrects_id == invoice_id, _INVOICE.c.state != "void")
    )
    since_ns, until_ns = last or of.until_ns, now_ns - SETTLE_NS
    found: list[Line] = []
    if since_ns < until_ns:
        captured, refunded = (of.since_ns, of.until_ns), (since_ns, until_ns)
        found = await billed_lines.refund_lines(conn, of.tenant_id, captured, refunded)
    if not found:
        seconds = SETTLE_NS // SECOND_NS
        raise InvoiceError(f"nothing of {invoice_id} was refunded after it, up to {seconds} seconds ago")
    period = (since_ns, until_ns)
    return await _add(conn, of.issuer_id, of.tenant_id, "credit_note", invoice_id, period, entropy, now_ns)


async def preview(conn: AsyncConnection, invoice: Invoice) -> dict[str, Any]:
    """The document that a draft would become, without number and dates."""
    return await _document(conn, invoice, number="", issued_ns=0, due_ns=0)


async def issue(conn: AsyncConnection, invoice_id: str, *, now_ns: int) -> Document:
    """Number it and store its document. Issuing again returns the document that there is. Raises InvoiceError."""
    invoice = await get_invoice(conn, invoice_id)
    await get_buyer(conn, invoice.tenant_id, lock=True)
    invoice = await get_invoice(conn, invoice_id)
    if invoice.state in ("issued", "paid"):
        return await get_document(conn, invoice_id)
    await _require_over(conn, invoice, now_ns)
    issuer = await get_issuer(conn, invoice.issuer_id)
    due_ns = now_ns + issuer.payment_days * DAY_NS
    await move(conn, invoice, "issued", issued_ns=now_ns, due_ns=due_ns)
    number = await take_number(conn, issuer.issuer_id)
    figures = await _document(conn, invoice, number=number_text(issuer, number), issued_ns=now_ns, due_ns=due_ns)
    text = canonical(figures)
    made = Document(invoice_id, number, text, digest(text))
    await conn.execute(
        insert(_DOCUMENT).values(
            invoice_id=invoice_id, issuer_id=issuer.issuer_id, number=number, document=text, sha256=made.sha256
        )
    )
    due = await _due(conn, invoice, figures)
    await credit_line.invoiced(conn, invoice.tenant_id, invoice_id, due, now_ns)
    return made


async def get_invoice(conn: AsyncConnection, invoice_id: str) -> Invoice:
    row = (await conn.execute(_INVOICES.where(_INVOICE.c.id == invoice_id))).first()
    if row is None:
        raise InvoiceError(f"there is no invoice {invoice_id!r}; see: bulkhead invoice list")
    return Invoice(*row)


async def get_document(conn: AsyncConnection, invoice_id: str) -> Document:
    """Raises InvoiceError where it was never issued."""
    row = (
        await conn.execute(
            select(_DOCUMENT.c.invoice_id, _DOCUMENT.c.number, _DOCUMENT.c.document, _DOCUMENT.c.sha256).where(
                _DOCUMENT.c.invoice_id == invoice_id
            )
        )
    ).first()
    if row is None:
        raise InvoiceError(f"{invoice_id} was never issued")
    return Document(*row)


async def list_invoices(
    conn: AsyncConnection,
    tenant_id: str | None = None,
    *,
    within: tuple[int, int] | None = None,
    before: Invoice | None = None,
    issued: bool = False,
    limit: int = LIST_MAX,
) -> list[Invoice]:
    """Newest first; with `within`, those whose period has a part in it, with `before`, those that follow it here, with
    `issued`, those that have a number."""
    query = _INVOICES.order_by(_INVOICE.c.created_ns.desc(), _INVOICE.c.id).limit(limit)
    if issued:
        query = query.where(_INVOICE.c.issued_ns.is_not(None))
    if before is not None:
        same = (_INVOICE.c.created_ns == before.created_ns) & (_INVOICE.c.id > before.invoice_id)
        query = query.where(or_(_INVOICE.c.created_ns < before.created_ns, same))
    if tenant_id is not None:
        query = query.where(_INVOICE.c.tenant_id == tenant_id)
    if within is not None:
        query = query.where(_INVOICE.c.since_ns < within[1], _INVOICE.c.until_ns > within[0])
    return [Invoice(*row) for row in await conn.execute(query)]


async def move(conn: AsyncConnection, invoice: Invoice, state: State, **values: Any) -> None:
    """The conditional UPDATE decides between two that move it at once."""
    origins = [origin for origin, targets in MOVES.items() if state in targets]
    changed = await conn.execute(
        update(_INVOICE)
        .where(_INVOICE.c.id == invoice.invoice_id, or_(*(_INVOICE.c.state == origin for origin in origins)))
        .values(state=state, **values)
    )
    if changed.rowcount == 0:
        now = (await get_invoice(conn, invoice.invoice_id)).state
        raise InvoiceError(f"{invoice.invoice_id} is {now}: it cannot become {state}")


async def lines_now(conn: AsyncConnection, invoice: Invoice) -> list[Line]:
    """The lines as the ledger gives them now: for an issued invoice, what its document says."""
    period = (invoice.since_ns, invoice.until_ns)
    if invoice.corrects_id is not None:
        of = await get_invoice(conn, invoice.corrects_id)
        return await billed_lines.refund_lines(conn, invoice.tenant_id, (of.since_ns, of.until_ns), period)
    usage = await billed_lines.usage_lines(conn, invoice.tenant_id, *period)
    return [*usage, *await billed_lines.other_lines(conn, invoice.tenant_id, *period)]


def number_text(issuer: Issuer, number: int) -> str:
    return f"{issuer.number_prefix}-{number:06d}"


async def _document(
    conn: AsyncConnection, invoice: Invoice, *, number: str, issued_ns: int, due_ns: int
) -> dict[str, Any]:
    buyer: Buyer = await get_buyer(conn, invoice.tenant_id)
    corrects = ""
    if invoice.corrects_id is not None:
        corrects = (await get_document(conn, invoice.corrects_id)).figures["number"]
    prepaid_nano = await _credit_used(conn, invoice, "paid")
    heading = Heading(
        invoice.kind,
        invoice.invoice_id,
        number,
        invoice.since_ns,
        invoice.until_ns,
        issued_ns,
        due_ns,
        await currency_of(conn, invoice.tenant_id),
        corrects,
    )
    lines = await lines_now(conn, invoice)
    return make_document(heading, await get_issuer(conn, invoice.issuer_id), buyer, lines, prepaid_nano)


async def _credit_used(conn: AsyncConnection, invoice: Invoice, kind: str) -> int:
    """What the document's ledger transactions took of credits of this kind."""
    period = (invoice.since_ns, invoice.until_ns)
    if invoice.corrects_id is None:
        return await billed_lines.credit_used(conn, invoice.tenant_id, *period, kind)
    of = await get_invoice(conn, invoice.corrects_id)
    captured = (of.since_ns, of.until_ns)
    return await billed_lines.credit_used_by_refunds(conn, invoice.tenant_id, captured, period, kind)


async def _due(conn: AsyncConnection, invoice: Invoice, figures: dict[str, Any]) -> credit_line.Due:
    unit_nano = NANO // 10 ** minor_digits(figures["currency"])
    paid_credit_nano = 0
    if figures["buyer"]["terms"] == "on_account":  # due, as what was drawn of the line is
        paid_credit_nano = await _credit_used(conn, invoice, "paid")
    return credit_line.Due(
        due_nano=figures["due_minor"] * unit_nano,
        line_nano=await _credit_used(conn, invoice, "line"),
        paid_credit_nano=paid_credit_nano,
        tax_nano=figures["tax_minor"] * unit_nano,
    )


async def _require_over(conn: AsyncConnection, invoice: Invoice, now_ns: int) -> None:
    if invoice.until_ns + SETTLE_NS > now_ns:
        seconds = (invoice.until_ns + SETTLE_NS - now_ns) // SECOND_NS + 1
        raise InvoiceError(f"the period of {invoice.invoice_id} is not over for long enough: wait {seconds} s")
    hold = tables.hold
    pending = await conn.scalar(
        select(hold.c.id).where(
            hold.c.tenant_id == invoice.tenant_id, hold.c.created_ns < invoice.until_ns, hold.c.state == "pending"
        )
    )
    if pending is not None:
        raise InvoiceError(f"a request of the period is not settled ({pending}): wait until its hold ends")


async def _next_start(conn: AsyncConnection, tenant_id: str) -> int:
    last = await conn.scalar(
        select(func.max(_INVOICE.c.until_ns)).where(
            _INVOICE.c.tenant_id == tenant_id, _INVOICE.c.kind == "invoice", _INVOICE.c.state != "void"
        )
    )
    began = await conn.scalar(select(tables.tenant.c.created_ns).where(tables.tenant.c.id == tenant_id))
    return int(last if last is not None else began or 0)


async def _add(
    conn: AsyncConnection,
    issuer_id: str,
    tenant_id: str,
    kind: InvoiceKind,
    corrects_id: str | None,
    period: tuple[int, int],
    entropy: Entropy,
    now_ns: int,
) -> Invoice:
    made = Invoice(
        new_id("inv", entropy),
        issuer_id,
        tenant_id,
        kind,
        corrects_id,
        "draft",
        *period,
        now_ns,
        None,
        None,
        None,
        None,
    )
    await conn.execute(insert(_INVOICE).values({column: getattr(made, name) for name, column in _COLUMNS.items()}))
    return made


_COLUMNS: Final = {name: name.removeprefix("invoice_") if name == "invoice_id" else name for name in Invoice.__slots__}
_INVOICES: Final = select(*(_INVOICE.c[column] for column in _COLUMNS.values()))
