"""How an issued invoice or credit note ends: by payments that add up to what is due, or void before the first of them.

Both take the buyer's lock first, so two payments at once, or a payment and a void, see each other.
"""

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.accounts import credit_line
from tenancy.accounts.posting import find_transaction
from tenancy.invoicing.invoice_document import NANO, minor_digits
from tenancy.invoicing.invoice_tables import invoice as _INVOICE
from tenancy.invoicing.invoices import Invoice, InvoiceError, State, get_document, get_invoice, move
from tenancy.invoicing.parties import get_buyer
from tenancy.invoicing.payments import (
    PAYMENT_ID_LENGTH_MAX,
    PAYMENTS_MAX,
    Payment,
    add_payment,
    find_payment,
    received,
)
from tenancy.money import require_int


async def pay(
    conn: AsyncConnection,
    invoice_id: str,
    reference: str,
    *,
    now_ns: int,
    amount_minor: int | None = None,
    payment_id: str = "",
) -> Invoice:
    """A payment of what is open, or of `amount_minor` of it, which then has an id. Paid is what has nothing open.

    The same payment again changes nothing. Of a credit note the amount is paid out, and given without a sign.
    Raises InvoiceError, or CreditLineError for a credit note whose money is in use again.
    """
    tenant_id = (await get_invoice(conn, invoice_id)).tenant_id
    await get_buyer(conn, tenant_id, lock=True)
    invoice = await get_invoice(conn, invoice_id)
    if not payment_id and amount_minor is not None:
        raise InvoiceError("a payment of a part has an id of its own, so that it is not noted twice")
    payment_id = payment_id or f"{invoice_id}:paid"
    earlier = await find_payment(conn, payment_id)
    if earlier is not None:
        asked = (invoice_id, reference, abs(earlier.amount_minor) if amount_minor is None else amount_minor)
        if (earlier.invoice_id, earlier.reference, abs(earlier.amount_minor)) != asked:
            raise InvoiceError(f"{payment_id!r} was noted with other arguments; {invoice_id} is {invoice.state}")
        return invoice
    if invoice.state != "issued":
        raise InvoiceError(f"{invoice_id} is {invoice.state}: it cannot become paid")
    if len(payment_id) > PAYMENT_ID_LENGTH_MAX or not payment_id.isprintable():
        raise InvoiceError(f"a payment's id has at most {PAYMENT_ID_LENGTH_MAX} printable characters")
    if await find_transaction(conn, payment_id) is not None:
        raise InvoiceError(f"{payment_id!r} is the id of something else in the ledger: take another")
    count, open_minor = await _open(conn, invoice_id)
    part = abs(open_minor) if amount_minor is None else require_int(amount_minor, "amount_minor")
    if part > abs(open_minor) or part < (amount_minor is not None):
        raise InvoiceError(f"{abs(open_minor)} minor units of {invoice_id} are open: {part} cannot be paid")
    if count >= PAYMENTS_MAX - 1 and part != abs(open_minor):
        raise InvoiceError(f"{invoice_id} has {count} payments already: what is left is paid at once")
    part = -part if open_minor < 0 else part
    currency = (await get_document(conn, invoice_id)).figures["currency"]
    amount_nano = part * (NANO // 10 ** minor_digits(currency))
    how: dict[str, Any] = {"payment_id": payment_id, "reference": reference, "now_ns": now_ns}
    await credit_line.paid(conn, tenant_id, invoice_id, amount_nano, **how)
    await add_payment(conn, Payment(payment_id, invoice_id, tenant_id, part, reference, now_ns))
    if part != open_minor:
        return invoice
    return await _end(conn, invoice_id, "paid", reference, now_ns)


async def void(conn: AsyncConnection, invoice_id: str, reason: str, *, now_ns: int) -> Invoice:
    """Its period can be billed again; an issued document and its number stay. Raises InvoiceError.

    Not once something was paid: then refunds and their credit note give it back.
    """
    tenant_id = (await get_invoice(conn, invoice_id)).tenant_id
    await get_buyer(conn, tenant_id, lock=True)
    credit_note = await conn.scalar(
        select(_INVOICE.c.id).where(_INVOICE.c.corrects_id == invoice_id, _INVOICE.c.state != "void")
    )
    if credit_note is not None:
        raise InvoiceError(f"{invoice_id} has a credit note, {credit_note}: void that first")
    before = await get_invoice(conn, invoice_id)
    count, minor = await received(conn, invoice_id)
    if before.state == "issued" and count:
        raise InvoiceError(
            f"{abs(minor)} minor units of {invoice_id} are paid: it cannot become void; refund what was wrong and "
            "issue a credit note"
        )
    after = await _end(conn, invoice_id, "void", reason, now_ns)
    if before.state != after.state:
        await credit_line.voided(conn, after.tenant_id, invoice_id, reason, now_ns)
    return after


async def open_of(conn: AsyncConnection, invoice: Invoice) -> int:
    """What has yet to be paid of it, in minor units; below zero: paid out. Nothing of a draft or a void one."""
    return (await _open(conn, invoice.invoice_id))[1] if invoice.state == "issued" else 0


async def _open(conn: AsyncConnection, invoice_id: str) -> tuple[int, int]:
    """(how many payments, minor units that are open)."""
    count, minor = await received(conn, invoice_id)
    return count, (await get_document(conn, invoice_id)).figures["due_minor"] - minor


async def _end(conn: AsyncConnection, invoice_id: str, state: State, note: str, now_ns: int) -> Invoice:
    invoice = await get_invoice(conn, invoice_id)
    if invoice.state == state and invoice.end_note == note:
        return invoice
    await move(conn, invoice, state, ended_ns=now_ns, end_note=note)
    return await get_invoice(conn, invoice_id)
