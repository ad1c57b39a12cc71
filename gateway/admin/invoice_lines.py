"""A tenant's newest invoices and credit notes as its page shows them: what is due, and what of it is open."""

from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.billing.wording import amount, day, interval
from tenancy.invoicing.endings import open_of
from tenancy.invoicing.invoices import Invoice, get_document, list_invoices

INVOICES_MAX = 12
TAGS = {"draft": "good", "issued": "warn", "paid": "good", "void": "good"}


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    invoice_id: str
    number: str
    kind: str
    period: str
    due_by: str
    due: str
    open: str
    word: str
    state: str  # good, warn, bad


async def invoice_lines(conn: AsyncConnection, tenant_id: str, now_ns: int) -> tuple[InvoiceLine, ...]:
    """The newest INVOICES_MAX. A draft has no figures before it is issued."""
    newest = (await list_invoices(conn, tenant_id))[:INVOICES_MAX]
    return tuple([await _line(conn, one, now_ns) for one in newest])


async def _line(conn: AsyncConnection, one: Invoice, now_ns: int) -> InvoiceLine:
    number, due_by, due, left = "-", "-", "-", "-"
    overdue = False
    if one.issued_ns is not None and one.due_ns is not None:
        figures, open_minor = (await get_document(conn, one.invoice_id)).figures, await open_of(conn, one)
        number, due_by = figures["number"], day(one.due_ns)
        due, left = amount(figures, figures["due_minor"]), amount(figures, open_minor)
        overdue = open_minor > 0 and one.due_ns < now_ns
    return InvoiceLine(
        invoice_id=one.invoice_id,
        number=number,
        kind=one.kind.replace("_", " "),
        period=interval({"since_ns": one.since_ns, "until_ns": one.until_ns}),
        due_by=due_by,
        due=due,
        open=left,
        word="overdue" if overdue else one.state,
        state="bad" if overdue else TAGS[one.state],
    )
