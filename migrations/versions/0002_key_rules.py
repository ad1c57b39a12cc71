"""What a key may be used for and from where, and when it last was.

Nullable columns without a default: neither database rewrites the table, and a key from before has no such rule.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_key", sa.Column("models", sa.Text(), nullable=True))
    op.add_column("api_key", sa.Column("networks", sa.Text(), nullable=True))
    op.add_column("api_key", sa.Column("last_used_ns", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    for name in ("last_used_ns", "networks", "models"):
        op.drop_column("api_key", name)
