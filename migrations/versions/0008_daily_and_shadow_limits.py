"""Limits: tokens per day, and which limits only watch.

Nullable columns without a default: neither database rewrites the table, and null is what all scopes had before.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("scope_limit", sa.Column("tokens_per_day", sa.BigInteger(), nullable=True))
    op.add_column("scope_limit", sa.Column("shadow", sa.Text(), nullable=True))


def downgrade() -> None:
    """A limit that only watched would refuse from now on: it goes."""
    for name in ("requests_per_minute", "tokens_per_minute", "concurrency_max"):
        op.execute(f"UPDATE scope_limit SET {name} = NULL WHERE ' ' || shadow || ' ' LIKE '% {name} %'")  # noqa: S608
    op.drop_column("scope_limit", "shadow")
    op.drop_column("scope_limit", "tokens_per_day")
