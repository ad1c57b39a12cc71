"""Credits with a kind and an end. What a tenant has already is one paid credit without an end."""

import sqlalchemy as sa
from alembic import op

from tenancy.tables import append_only_ddl, credit_use

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "credit",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("amount_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("left_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("expires_ns", sa.BigInteger(), nullable=True),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind IN ('promotional', 'paid')", name="ck_credit_kind"),
        sa.CheckConstraint("left_nano_usd >= 0", name="ck_credit_not_negative"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_credit_tenant_id_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_credit"),
    )
    something_left = sa.text("left_nano_usd > 0")
    op.create_index(
        "ix_credit_open", "credit", ["tenant_id"], sqlite_where=something_left, postgresql_where=something_left
    )
    op.create_table(
        "credit_use",
        sa.Column("transaction_id", sa.String(length=128), nullable=False),
        sa.Column("credit_id", sa.String(length=128), nullable=False),
        sa.Column("amount_nano_usd", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["transaction_id"], ["ledger_transaction.id"], name="fk_credit_use_transaction_id_ledger_transaction"
        ),
        sa.ForeignKeyConstraint(["credit_id"], ["credit.id"], name="fk_credit_use_credit_id_credit"),
        sa.PrimaryKeyConstraint("transaction_id", "credit_id", name="pk_credit_use"),
    )
    op.create_index("ix_credit_use_credit_id", "credit_use", ["credit_id"], unique=False)
    for statement in append_only_ddl(op.get_context().dialect.name, credit_use):
        op.execute(statement)
    op.execute(
        "INSERT INTO credit (id, tenant_id, kind, amount_nano_usd, left_nano_usd, expires_ns, created_ns) "
        "SELECT tenant_id || '\\:opening', tenant_id, 'paid', SUM(balance_nano_usd), SUM(balance_nano_usd), NULL, "
        "MAX(created_ns) FROM account WHERE kind IN ('credit', 'held') GROUP BY tenant_id "
        "HAVING SUM(balance_nano_usd) > 0"
    )


def downgrade() -> None:
    """The money stays; of what it is made is forgotten."""
    op.drop_table("credit_use")
    op.drop_table("credit")
