"""What a correction corrects: the id of an earlier ledger transaction."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("ledger_transaction", sa.Column("corrects_id", sa.String(length=128), nullable=True))
    op.create_index("ix_ledger_transaction_corrects_id", "ledger_transaction", ["corrects_id"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_ledger_transaction_corrects_id", table_name="ledger_transaction")
    op.drop_column("ledger_transaction", "corrects_id")
