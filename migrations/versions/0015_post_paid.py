"""Credit lines of post-paid tenants; one account of a kind for a tenant, so that its currency is one; withdrawn prices.

SQLite cannot change a constraint, so the tables of credits and of prices are copied there, with their indexes; the
triggers of prices go with the old one and are made again. Nobody has two accounts of a kind: there was no way to open
them.
"""

import sqlalchemy as sa
from alembic import op

from tenancy.pricing.price_tables import price_withdrawal
from tenancy.tables import append_only_ddl, price

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

BEFORE = ("model", "tier", "currency", "effective_from_ns")
NOW = (*BEFORE, "attempt")


def upgrade() -> None:
    _kinds("'promotional', 'paid', 'line'")
    op.create_index("ux_account_one_of_a_kind", "account", ["tenant_id", "kind"], unique=True)
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
    """Fails where there are credit lines, whose use could not be told any more, or withdrawn prices."""
    if op.get_bind().execute(sa.text("SELECT count(*) FROM price_withdrawal")).scalar():
        raise ValueError("prices were withdrawn: the version before this one would charge by them")
    op.drop_table("price_withdrawal")
    with op.batch_alter_table("price") as batch:
        batch.drop_constraint(f"uq_price_{'_'.join(NOW)}", type_="unique")
        batch.create_unique_constraint(f"uq_price_{'_'.join(BEFORE)}", list(BEFORE))
        batch.drop_column("attempt")
    _triggers_again()
    op.drop_index("ux_account_one_of_a_kind", table_name="account")
    _kinds("'promotional', 'paid'")


def _kinds(kinds: str) -> None:
    with op.batch_alter_table("credit") as batch:
        batch.drop_constraint("ck_credit_kind", type_="check")
        batch.create_check_constraint("ck_credit_kind", f"kind IN ({kinds})")


def _triggers_again() -> None:
    if op.get_context().dialect.name == "sqlite":
        for statement in append_only_ddl("sqlite", price):
            op.execute(statement)
