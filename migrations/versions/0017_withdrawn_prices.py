"""Prices that were withdrawn before they were in force, and others for the same instant after them.

SQLite cannot change a constraint, so the price table is copied there; its triggers go with the old one and are made
again.
"""

import sqlalchemy as sa
from alembic import op

from tenancy.price_tables import price_withdrawal
from tenancy.tables import append_only_ddl, price

revision = "0017"
down_revision = "0015"
branch_labels = None
depends_on = None

BEFORE = ("model", "tier", "currency", "effective_from_ns")
NOW = (*BEFORE, "attempt")


def upgrade() -> None:
    with op.batch_alter_table("price") as batch:
        batch.add_column(sa.Column("attempt", sa.BigInteger(), nullable=False, server_default="0"))
        batch.drop_constraint(f"uq_price_{'_'.join(BEFORE)}", type_="unique")
        batch.create_unique_constraint(f"uq_price_{'_'.join(NOW)}", list(NOW))
    _triggers_again()
    op.create_table(
        "price_withdrawal",
        sa.Column("price_id", sa.String(length=64), nullable=False),
        sa.Column("withdrawn_ns", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["price_id"], ["price.id"], name="fk_price_withdrawal_price_id_price"),
        sa.PrimaryKeyConstraint("price_id", name="pk_price_withdrawal"),
    )
    for statement in append_only_ddl(op.get_context().dialect.name, price_withdrawal):
        op.execute(statement)


def downgrade() -> None:
    """Fails where a price was withdrawn: the version before would charge by it."""
    if op.get_bind().execute(sa.text("SELECT count(*) FROM price_withdrawal")).scalar():
        raise ValueError("prices were withdrawn: the version before this one would charge by them")
    op.drop_table("price_withdrawal")
    with op.batch_alter_table("price") as batch:
        batch.drop_constraint(f"uq_price_{'_'.join(NOW)}", type_="unique")
        batch.create_unique_constraint(f"uq_price_{'_'.join(BEFORE)}", list(BEFORE))
        batch.drop_column("attempt")
    _triggers_again()


def _triggers_again() -> None:
    if op.get_context().dialect.name == "sqlite":
        for statement in append_only_ddl("sqlite", price):
            op.execute(statement)
