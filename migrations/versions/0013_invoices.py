"""Issuers, buyers, invoices and their documents."""

import sqlalchemy as sa
from alembic import op

from tenancy.invoicing.invoice_tables import invoice_document
from tenancy.tables import append_only_ddl

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

TENANT = "current_setting('bulkhead.tenant', true)"
BOUND = f"coalesce({TENANT}, '')"
RULES = {
    "buyer": f"tenant_id = {TENANT}",
    "invoice": f"tenant_id = {TENANT}",
    "invoice_document": "EXISTS (SELECT 1 FROM invoice i WHERE i.id = invoice_id)",
}


def upgrade() -> None:
    op.create_table(
        "issuer",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("tax_id", sa.String(length=64), nullable=False),
        sa.Column("payment_details", sa.Text(), nullable=False),
        sa.Column("number_prefix", sa.String(length=16), nullable=False),
        sa.Column("next_number", sa.BigInteger(), nullable=False),
        sa.Column("payment_days", sa.BigInteger(), nullable=False),
        sa.Column("updated_ns", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("next_number >= 1", name="ck_issuer_from_one"),
        sa.PrimaryKeyConstraint("id", name="pk_issuer"),
        sa.UniqueConstraint("number_prefix", name="uq_issuer_number_prefix"),
    )
    op.create_table(
        "buyer",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("issuer_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("tax_id", sa.String(length=64), nullable=False),
        sa.Column("tax_rate_bp", sa.BigInteger(), nullable=False),
        sa.Column("terms", sa.String(length=16), nullable=False),
        sa.Column("updated_ns", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("tax_rate_bp BETWEEN 0 AND 10000", name="ck_buyer_tax_rate"),
        sa.CheckConstraint("terms IN ('prepaid', 'on_account')", name="ck_buyer_terms"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_buyer_tenant_id_tenant"),
        sa.ForeignKeyConstraint(["issuer_id"], ["issuer.id"], name="fk_buyer_issuer_id_issuer"),
        sa.PrimaryKeyConstraint("tenant_id", name="pk_buyer"),
    )
    op.create_table(
        "invoice",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("issuer_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("corrects_id", sa.String(length=64), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("since_ns", sa.BigInteger(), nullable=False),
        sa.Column("until_ns", sa.BigInteger(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("issued_ns", sa.BigInteger(), nullable=True),
        sa.Column("due_ns", sa.BigInteger(), nullable=True),
        sa.Column("ended_ns", sa.BigInteger(), nullable=True),
        sa.Column("end_note", sa.Text(), nullable=True),
        sa.CheckConstraint("kind IN ('invoice', 'credit_note')", name="ck_invoice_kind"),
        sa.CheckConstraint("(kind = 'credit_note') = (corrects_id IS NOT NULL)", name="ck_invoice_corrects"),
        sa.CheckConstraint("state IN ('draft', 'issued', 'paid', 'void')", name="ck_invoice_state"),
        sa.CheckConstraint("since_ns < until_ns", name="ck_invoice_period"),
        sa.CheckConstraint("(issued_ns IS NULL) = (due_ns IS NULL)", name="ck_invoice_due"),
        sa.CheckConstraint("(state IN ('paid', 'void')) = (ended_ns IS NOT NULL)", name="ck_invoice_ended_once"),
        sa.CheckConstraint("state NOT IN ('issued', 'paid') OR issued_ns IS NOT NULL", name="ck_invoice_issued_once"),
        sa.ForeignKeyConstraint(["issuer_id"], ["issuer.id"], name="fk_invoice_issuer_id_issuer"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_invoice_tenant_id_tenant"),
        sa.ForeignKeyConstraint(["corrects_id"], ["invoice.id"], name="fk_invoice_corrects_id_invoice"),
        sa.PrimaryKeyConstraint("id", name="pk_invoice"),
    )
    op.create_index("ix_invoice_tenant_id_since_ns", "invoice", ["tenant_id", "since_ns"], unique=False)
    op.create_index("ix_invoice_corrects_id", "invoice", ["corrects_id"], unique=False)
    op.create_table(
        "invoice_document",
        sa.Column("invoice_id", sa.String(length=64), nullable=False),
        sa.Column("issuer_id", sa.String(length=64), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["invoice_id"], ["invoice.id"], name="fk_invoice_document_invoice_id_invoice"),
        sa.ForeignKeyConstraint(["issuer_id"], ["issuer.id"], name="fk_invoice_document_issuer_id_issuer"),
        sa.PrimaryKeyConstraint("invoice_id", name="pk_invoice_document"),
        sa.UniqueConstraint("issuer_id", "number", name="uq_invoice_document_issuer_id_number"),
    )
    for statement in append_only_ddl(op.get_context().dialect.name, invoice_document):
        op.execute(statement)
    if op.get_bind().dialect.name == "postgresql":
        for table, rule in RULES.items():
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
            op.execute(f"CREATE POLICY {table}_of_tenant ON {table} USING ({BOUND} = '' OR {rule})")


def downgrade() -> None:
    """Issued documents are destroyed: export them first."""
    for name in ("invoice_document", "invoice", "buyer", "issuer"):
        op.drop_table(name)
