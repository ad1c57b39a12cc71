"""Prices per tier and currency, with percents for other tiers and graduated steps; drafts; volumes.

Prices that are there stay what they are: of the default tier, in USD, the same for every tier. SQLite cannot change a
constraint, so the price table is copied there; its triggers go with the old one and are made again.
"""

import sqlalchemy as sa
from alembic import op

from tenancy.pricing.price_tables import price_step
from tenancy.tables import append_only_ddl, price

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

BEFORE, NOW = ("model", "effective_from_ns"), ("model", "tier", "currency", "effective_from_ns")
TENANT = "current_setting('bulkhead.tenant', true)"
BOUND = f"coalesce({TENANT}, '')"
PERCENTS = ("flex_percent", "batch_percent", "priority_percent")


def upgrade() -> None:
    with op.batch_alter_table("price") as batch:
        batch.add_column(sa.Column("tier", sa.String(length=16), nullable=False, server_default="default"))
        batch.add_column(sa.Column("currency", sa.String(length=3), nullable=False, server_default="USD"))
        for name in PERCENTS:
            batch.add_column(sa.Column(name, sa.BigInteger(), nullable=False, server_default="100"))
        batch.drop_constraint(f"uq_price_{'_'.join(BEFORE)}", type_="unique")
        batch.create_unique_constraint(f"uq_price_{'_'.join(NOW)}", list(NOW))
        batch.create_check_constraint("ck_price_tier", "tier IN ('default', 'flex', 'batch', 'priority')")
    _triggers_again()
    op.add_column("hold", sa.Column("tier", sa.String(length=16), nullable=False, server_default="default"))
    op.add_column("usage_record", sa.Column("tier", sa.String(length=16), nullable=False, server_default="default"))
    op.add_column("usage_record", sa.Column("num_tokens_before", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_table(
        "price_step",
        sa.Column("price_id", sa.String(length=64), nullable=False),
        sa.Column("from_tokens", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("input_pico_usd", sa.BigInteger(), nullable=False),
        sa.Column("cached_input_pico_usd", sa.BigInteger(), nullable=False),
        sa.Column("output_pico_usd", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("from_tokens > 0", name="ck_price_step_above_the_first"),
        sa.CheckConstraint(
            "input_pico_usd >= 0 AND cached_input_pico_usd >= 0 AND output_pico_usd >= 0",
            name="ck_price_step_not_negative",
        ),
        sa.ForeignKeyConstraint(["price_id"], ["price.id"], name="fk_price_step_price_id_price"),
        sa.PrimaryKeyConstraint("price_id", "from_tokens", name="pk_price_step"),
    )
    for statement in append_only_ddl(op.get_context().dialect.name, price_step):
        op.execute(statement)
    op.create_table(
        "price_draft",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("tier", sa.String(length=16), nullable=False),
        sa.Column("terms", sa.Text(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("ended_ns", sa.BigInteger(), nullable=True),
        sa.Column("price_id", sa.String(length=64), nullable=True),
        sa.CheckConstraint("price_id IS NULL OR ended_ns IS NOT NULL", name="ck_price_draft_scheduled_once"),
        sa.ForeignKeyConstraint(["price_id"], ["price.id"], name="fk_price_draft_price_id_price"),
        sa.PrimaryKeyConstraint("id", name="pk_price_draft"),
    )
    op.create_table(
        "volume",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("tier", sa.String(length=16), nullable=False),
        sa.Column("month_start_ns", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("num_tokens >= 0", name="ck_volume_not_negative"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_volume_tenant_id_tenant"),
        sa.PrimaryKeyConstraint("tenant_id", "model", "tier", "month_start_ns", name="pk_volume"),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE volume ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE volume FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY volume_of_tenant ON volume USING ({BOUND} = '' OR tenant_id = {TENANT})")


def downgrade() -> None:
    """Fails where two prices differ only in tier or currency: what they charged cannot be told any more."""
    for name in ("volume", "price_draft", "price_step"):
        op.drop_table(name)
    op.drop_column("usage_record", "num_tokens_before")
    op.drop_column("usage_record", "tier")
    op.drop_column("hold", "tier")
    with op.batch_alter_table("price") as batch:
        batch.drop_constraint("ck_price_tier", type_="check")
        batch.drop_constraint(f"uq_price_{'_'.join(NOW)}", type_="unique")
        batch.create_unique_constraint(f"uq_price_{'_'.join(BEFORE)}", list(BEFORE))
        for name in (*PERCENTS, "currency", "tier"):
            batch.drop_column(name)
    _triggers_again()


def _triggers_again() -> None:
    if op.get_context().dialect.name == "sqlite":
        for statement in append_only_ddl("sqlite", price):
            op.execute(statement)
