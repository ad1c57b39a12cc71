"""A tenant's share of the engine, beside its limits.

A nullable column without a default: neither database rewrites the table, and null is the weight that all had before.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("scope_limit", sa.Column("weight", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("scope_limit", "weight")
