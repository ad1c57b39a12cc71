"""Invoices, their payments and files as commands with ``--json`` and routes show them."""

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.billing.csv_file import render_csv
from gateway.billing.pdf import render_pdf
from gateway.records.plain import Record, record
from tenancy.invoicing.endings import open_of
from tenancy.invoicing.invoice_document import canonical
from tenancy.invoicing.invoices import Invoice, get_document, get_invoice, preview
from tenancy.invoicing.payments import payments_of

FileKind = Literal["pdf", "csv", "json"]
FILE_KINDS: Final[tuple[FileKind, ...]] = get_args(FileKind)


@dataclass(frozen=True, slots=True)
class InvoiceFile:
    """What a file of an invoice is made from; of an issued one the same bytes each time."""

    figures: dict[str, Any]
    sha256: str  # of the stored document; empty: a draft

    def render(self, kind: FileKind) -> bytes:
        """Slow for pdf: call it in a thread."""
        if kind == "pdf":
            return render_pdf(self.figures, self.sha256)
        return render_csv(self.figures) if kind == "csv" else canonical(self.figures).encode()


async def figures_of(conn: AsyncConnection, invoice: Invoice) -> dict[str, Any]:
    """Of an issued invoice as its document is stored, of a draft as it would be now."""
    if invoice.issued_ns is None:
        return await preview(conn, invoice)
    return (await get_document(conn, invoice.invoice_id)).figures


async def file_of(conn: AsyncConnection, invoice: Invoice) -> InvoiceFile:
    sha256 = "" if invoice.issued_ns is None else (await get_document(conn, invoice.invoice_id)).sha256
    return InvoiceFile(await figures_of(conn, invoice), sha256)


async def invoice_record(conn: AsyncConnection, invoice: Invoice, tenant: str) -> Record:
    """``tenant``: its name."""
    own = {"state": invoice.state, "tenant": tenant, "open_minor": await open_of(conn, invoice)}
    return own | await figures_of(conn, invoice)


async def payments_record(conn: AsyncConnection, invoice_id: str) -> Record:
    """In the order in which they came, and what is open. Raises InvoiceError."""
    one = await get_invoice(conn, invoice_id)
    figures = await figures_of(conn, one)
    return {
        "invoice_id": invoice_id,
        "state": one.state,
        "currency": figures["currency"],
        "minor_digits": figures["minor_digits"],
        "due_minor": figures["due_minor"],
        "open_minor": await open_of(conn, one),
        "payments": [record(payment) for payment in await payments_of(conn, invoice_id)],
    }
