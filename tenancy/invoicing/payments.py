"""Payments of issued documents, as they came in: append-only rows that name their document, in its minor units.

    open = due - sum of payments            never beyond zero: the document is paid when nothing is open

Of a credit note everything has the sign turned: it is paid out. What a payment does to a post-paid tenant's accounts is
the ledger transaction of the same id (credit_line.py); a pre-paid tenant's money came in with its credit.
"""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.invoicing.invoice_tables import invoice_payment as _PAYMENT

PAYMENTS_MAX: Final = 1_000  # of one document; the last one is then the rest
PAYMENT_ID_LENGTH_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class Payment:
    payment_id: str
    invoice_id: str
    tenant_id: str
    amount_minor: int
    reference: str
    paid_ns: int


async def find_payment(conn: AsyncConnection, payment_id: str) -> Payment | None:
    row = (await conn.execute(_PAYMENTS.where(_PAYMENT.c.id == payment_id))).first()
    return None if row is None else Payment(*row)


async def payments_of(conn: AsyncConnection, invoice_id: str) -> list[Payment]:
    """In the order in which they came."""
    query = _PAYMENTS.where(_PAYMENT.c.invoice_id == invoice_id).order_by(_PAYMENT.c.paid_ns, _PAYMENT.c.id)
    return [Payment(*row) for row in await conn.execute(query)]


async def received(conn: AsyncConnection, invoice_id: str) -> tuple[int, int]:
    """(how many payments, their sum in minor units)."""
    query = select(func.count(), func.coalesce(func.sum(_PAYMENT.c.amount_minor), 0))
    count, minor = (await conn.execute(query.where(_PAYMENT.c.invoice_id == invoice_id))).one()
    return int(count), int(minor)


async def add_payment(conn: AsyncConnection, payment: Payment) -> None:
    """The caller has the buyer's lock and has seen that so much is open."""
    values = {column: getattr(payment, name) for name, column in _COLUMNS.items()}
    await conn.execute(insert(_PAYMENT).values(values))


_COLUMNS: Final = {name: "id" if name == "payment_id" else name for name in Payment.__slots__}
_PAYMENTS: Final = select(*(_PAYMENT.c[column] for column in _COLUMNS.values()))
