"""Which service tiers a key may name. Nullable without a default: a key from before may name any."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_key", sa.Column("tiers", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("api_key", "tiers")
