"""Changes to invoices and to who is on them, each with its log entry in the same transaction."""

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import Entry, Value
from audit.transparency.outbox import append
from tenancy.ids import new_id
from tenancy.invoicing import endings, invoices, parties
from tenancy.invoicing.invoices import Document, Invoice
from tenancy.invoicing.parties import Buyer, Issuer
from tenancy.invoicing.payments import find_payment


@dataclass(frozen=True, slots=True)
class Bookkeeper:
    """Works in the caller's transaction `conn`, at `now_ns`."""

    conn: AsyncConnection
    entropy: Callable[[int], bytes]
    now_ns: int

    async def set_issuer(
        self, number_prefix: str, *, name: str, address: str, tax_id: str, payment_details: str, payment_days: int
    ) -> Issuer:
        """Raises PartyError."""
        issuer = await parties.set_issuer(
            self.conn,
            name=name,
            address=address,
            tax_id=tax_id,
            payment_details=payment_details,
            number_prefix=number_prefix,
            payment_days=payment_days,
            entropy=self.entropy,
            now_ns=self.now_ns,
        )
        body: dict[str, Value] = {
            "issuer_id": issuer.issuer_id,
            "number_prefix": number_prefix,
            "name": name,
            "tax_id": tax_id,
            "payment_days": payment_days,
        }
        await self._log("invoice.issuer_set", "", body)
        return issuer

    async def set_buyer(self, buyer: Buyer) -> None:
        await parties.set_buyer(self.conn, buyer, now_ns=self.now_ns)
        body: dict[str, Value] = {
            "issuer_id": buyer.issuer_id,
            "name": buyer.name,
            "tax_id": buyer.tax_id,
            "tax_rate_bp": buyer.tax_rate_bp,
            "terms": buyer.terms,
        }
        await self._log("invoice.buyer_set", buyer.tenant_id, body)

    async def draft(self, tenant_id: str, since_ns: int | None, until_ns: int) -> Invoice:
        """Raises InvoiceError or PartyError."""
        made = await invoices.draft_invoice(
            self.conn, tenant_id, since_ns=since_ns, until_ns=until_ns, entropy=self.entropy, now_ns=self.now_ns
        )
        await self._log_drafted(made)
        return made

    async def draft_credit_note(self, invoice_id: str) -> Invoice:
        """Raises InvoiceError."""
        made = await invoices.draft_credit_note(self.conn, invoice_id, entropy=self.entropy, now_ns=self.now_ns)
        await self._log_drafted(made)
        return made

    async def issue(self, invoice_id: str) -> Document:
        """A repeat changes and logs nothing. Raises InvoiceError."""
        before = await invoices.get_invoice(self.conn, invoice_id)
        document = await invoices.issue(self.conn, invoice_id, now_ns=self.now_ns)
        if before.state != "draft":
            return document
        figures = document.figures
        if int(figures["issued_ns"]) != self.now_ns:  # another issued it while we waited, and logged it
            return document
        body: dict[str, Value] = {
            "invoice_id": invoice_id,
            "number": figures["number"],
            "document_sha256": document.sha256,
            "currency": figures["currency"],
            "invoice_kind": before.kind,
            "net_minor": figures["net_minor"],
            "tax_minor": figures["tax_minor"],
            "due_minor": figures["due_minor"],
            "due_ns": int(figures["due_ns"]),
        }
        await self._log("invoice.issued", before.tenant_id, body)
        return document

    async def pay(
        self, invoice_id: str, reference: str, *, amount_minor: int | None = None, payment_id: str = ""
    ) -> Invoice:
        """What is open, or a part of it. A repeat changes and logs nothing; a part without an id is never a repeat.

        Raises InvoiceError or CreditLineError.
        """
        if amount_minor is not None and not payment_id:
            payment_id = new_id("pay", self.entropy)
        payment_id = payment_id or f"{invoice_id}:paid"
        known = await find_payment(self.conn, payment_id)
        after = await endings.pay(
            self.conn,
            invoice_id,
            reference,
            now_ns=self.now_ns,
            amount_minor=amount_minor,
            payment_id=payment_id,
        )
        made = await find_payment(self.conn, payment_id)
        if made is None or known is not None or made.paid_ns != self.now_ns:  # the last: another did while we waited
            return after
        body: dict[str, Value] = {
            "invoice_id": invoice_id,
            "payment_id": payment_id,
            "amount_minor": made.amount_minor,
            "open_minor": await endings.open_of(self.conn, after),
            "reference": reference,
        }
        await self._log("invoice.payment", after.tenant_id, body)
        if after.state == "paid":
            await self._log("invoice.paid", after.tenant_id, {"invoice_id": invoice_id, "reference": reference})
        return after

    async def void(self, invoice_id: str, reason: str) -> Invoice:
        """A repeat changes and logs nothing. Raises InvoiceError."""
        before = await invoices.get_invoice(self.conn, invoice_id)
        gone = await endings.void(self.conn, invoice_id, reason, now_ns=self.now_ns)
        if before.state != gone.state:
            await self._log("invoice.voided", gone.tenant_id, {"invoice_id": invoice_id, "reason": reason})
        return gone

    async def _log_drafted(self, made: Invoice) -> None:
        body: dict[str, Value] = {
            "invoice_id": made.invoice_id,
            "corrects_id": made.corrects_id or "",
            "invoice_kind": made.kind,
            "since_ns": made.since_ns,
            "until_ns": made.until_ns,
        }
        await self._log("invoice.drafted", made.tenant_id, body)

    async def _log(self, kind: str, tenant_id: str, body: dict[str, Value]) -> None:
        await append(self.conn, Entry(kind, tenant_id, self.now_ns, body), entropy=self.entropy)
