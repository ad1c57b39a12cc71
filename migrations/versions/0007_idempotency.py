"""Idempotency keys of tenants, and the answers that are retained under them."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotency_key",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(length=32), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("expires_ns", sa.BigInteger(), nullable=False),
        sa.Column("content_type", sa.String(length=100), nullable=True),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.CheckConstraint("(answer IS NULL) = (content_type IS NULL)", name="ck_idempotency_key_whole"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_idempotency_key_tenant_id_tenant"),
        sa.PrimaryKeyConstraint("tenant_id", "key", name="pk_idempotency_key"),
    )
    op.create_index("ix_idempotency_key_expires_ns", "idempotency_key", ["expires_ns"], unique=False)


def downgrade() -> None:
    op.drop_table("idempotency_key")
