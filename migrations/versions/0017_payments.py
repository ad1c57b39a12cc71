"""Payments of invoices, one row each. Whatever was paid before there were parts was paid as a whole, by one payment."""

import json

import sqlalchemy as sa
from alembic import op

from tenancy.invoicing.invoice_tables import invoice_payment
from tenancy.tables import append_only_ddl

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

TENANT = "current_setting('bulkhead.tenant', true)"
BOUND = f"coalesce({TENANT}, '')"
RULE = f"tenant_id = {TENANT}"


def upgrade() -> None:
    op.create_table(
        "invoice_payment",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("invoice_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column("paid_ns", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["invoice_id"], ["invoice.id"], name="fk_invoice_payment_invoice_id_invoice"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_invoice_payment_tenant_id_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_invoice_payment"),
    )
    op.create_index("ix_invoice_payment_invoice_id", "invoice_payment", ["invoice_id"], unique=False)
    paid = op.get_bind().execute(
        sa.text(
            "SELECT i.id, i.tenant_id, i.end_note, i.ended_ns, d.document FROM invoice i"
            " JOIN invoice_document d ON d.invoice_id = i.id WHERE i.state = 'paid'"
        )
    )
    rows = [
        {
            "id": f"{invoice_id}:paid",
            "invoice_id": invoice_id,
            "tenant_id": tenant_id,
            "amount_minor": json.loads(document)["due_minor"],
            "reference": note or "",
            "paid_ns": ended_ns,
        }
        for invoice_id, tenant_id, note, ended_ns, document in paid
    ]
    if rows:
        op.get_bind().execute(sa.insert(invoice_payment), rows)
    for statement in append_only_ddl(op.get_context().dialect.name, invoice_payment):
        op.execute(statement)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE invoice_payment ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE invoice_payment FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY invoice_payment_of_tenant ON invoice_payment USING ({BOUND} = '' OR {RULE})")


def downgrade() -> None:
    """Fails where an invoice is paid in part: the version before this one would ask for all of it."""
    parts = "SELECT count(*) FROM invoice_payment p JOIN invoice i ON i.id = p.invoice_id WHERE i.state = 'issued'"
    if op.get_bind().execute(sa.text(parts)).scalar():
        raise ValueError("invoices are paid in part: the version before this one would ask for all of it again")
    op.drop_table("invoice_payment")
