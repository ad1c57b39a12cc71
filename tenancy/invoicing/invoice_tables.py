"""Who sells, who is billed, what was billed, and what of it was paid.

A document and its payments are append-only: what was issued is never changed, whatever becomes of it. `invoice` is its
lifecycle, issuer and buyer are current values that are copied into each document.
"""

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, String, Table, Text, UniqueConstraint

from tenancy.tables import ExactInteger, make_append_only, metadata

issuer = Table(
    "issuer",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("address", Text, nullable=False),
    Column("tax_id", String(64), nullable=False),
    Column("payment_details", Text, nullable=False),
    Column("number_prefix", String(16), nullable=False, unique=True),
    Column("next_number", ExactInteger(), nullable=False),
    Column("payment_days", ExactInteger(), nullable=False),
    Column("updated_ns", ExactInteger(), nullable=False),
    CheckConstraint("next_number >= 1", name="from_one"),
)

buyer = Table(
    "buyer",
    metadata,
    Column("tenant_id", String(64), ForeignKey("tenant.id"), primary_key=True),
    Column("issuer_id", String(64), ForeignKey("issuer.id"), nullable=False),
    Column("name", String(200), nullable=False),
    Column("address", Text, nullable=False),
    Column("tax_id", String(64), nullable=False),
    Column("tax_rate_bp", ExactInteger(), nullable=False),
    Column("terms", String(16), nullable=False),
    Column("updated_ns", ExactInteger(), nullable=False),
    CheckConstraint("tax_rate_bp BETWEEN 0 AND 10000", name="tax_rate"),
    CheckConstraint("terms IN ('prepaid', 'on_account')", name="terms"),
)

invoice = Table(
    "invoice",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("issuer_id", String(64), ForeignKey("issuer.id"), nullable=False),
    Column("tenant_id", String(64), ForeignKey("tenant.id"), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("corrects_id", String(64), ForeignKey("invoice.id"), nullable=True),  # of a credit note: its invoice
    Column("state", String(16), nullable=False),
    Column("since_ns", ExactInteger(), nullable=False),
    Column("until_ns", ExactInteger(), nullable=False),
    Column("created_ns", ExactInteger(), nullable=False),
    Column("issued_ns", ExactInteger(), nullable=True),
    Column("due_ns", ExactInteger(), nullable=True),
    Column("ended_ns", ExactInteger(), nullable=True),  # when it was paid or became void
    Column("end_note", Text, nullable=True),  # the payment's reference, or why it is void
    CheckConstraint("kind IN ('invoice', 'credit_note')", name="kind"),
    CheckConstraint("(kind = 'credit_note') = (corrects_id IS NOT NULL)", name="corrects"),
    CheckConstraint("state IN ('draft', 'issued', 'paid', 'void')", name="state"),
    CheckConstraint("since_ns < until_ns", name="period"),
    CheckConstraint("(issued_ns IS NULL) = (due_ns IS NULL)", name="due"),
    CheckConstraint("(state IN ('paid', 'void')) = (ended_ns IS NOT NULL)", name="ended_once"),
    CheckConstraint("state NOT IN ('issued', 'paid') OR issued_ns IS NOT NULL", name="issued_once"),
    Index(None, "tenant_id", "since_ns"),
    Index(None, "corrects_id"),
)

invoice_document = Table(
    "invoice_document",
    metadata,
    Column("invoice_id", String(64), ForeignKey("invoice.id"), primary_key=True),
    Column("issuer_id", String(64), ForeignKey("issuer.id"), nullable=False),
    Column("number", ExactInteger(), nullable=False),
    Column("document", Text, nullable=False),  # canonical JSON
    Column("sha256", String(64), nullable=False),
    UniqueConstraint("issuer_id", "number"),
)
make_append_only(invoice_document)

invoice_payment = Table(
    "invoice_payment",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("invoice_id", String(64), ForeignKey("invoice.id"), nullable=False),
    Column("tenant_id", String(64), ForeignKey("tenant.id"), nullable=False),
    Column("amount_minor", ExactInteger(), nullable=False),  # of a credit note below zero: it was paid out
    Column("reference", Text, nullable=False),
    Column("paid_ns", ExactInteger(), nullable=False),
    Index(None, "invoice_id"),
)
make_append_only(invoice_payment)
