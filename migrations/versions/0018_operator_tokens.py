"""Operators' tokens, for programs that do what an operator does."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "operator_token",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("operator_id", sa.String(length=64), nullable=False),
        sa.Column("public_id", sa.String(length=16), nullable=False),
        sa.Column("secret_hmac", sa.LargeBinary(length=32), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("read_only", sa.Boolean(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("expires_ns", sa.BigInteger(), nullable=True),
        sa.Column("revoked_ns", sa.BigInteger(), nullable=True),
        sa.Column("last_used_ns", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["operator_id"], ["operator.id"], name="fk_operator_token_operator_id_operator"),
        sa.PrimaryKeyConstraint("id", name="pk_operator_token"),
        sa.UniqueConstraint("public_id", name="uq_operator_token_public_id"),
    )
    op.create_index("ix_operator_token_operator_id", "operator_token", ["operator_id"], unique=False)


def downgrade() -> None:
    """The tokens are gone: the version before this one has no routes for them."""
    op.drop_table("operator_token")
