"""What a request took of the engine, on its usage row: null in rows that are there, whose requests nobody measured. And
what each engine counts in all, so that idle time and the house's own runs are known."""

import sqlalchemy as sa
from alembic import op

from tenancy.accounts.one_trip import function_ddl
from tenancy.tables import append_only_ddl
from tenancy.usage.engine_time import engine_time

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

EFFORT = ("engine_ns", "block_ns", "num_prefill_tokens", "num_recomputed_tokens", "num_decode_steps")


def upgrade() -> None:
    for name in EFFORT:
        op.add_column("usage_record", sa.Column(name, sa.BigInteger(), nullable=True))
    op.create_table(
        "engine_time",
        sa.Column("epoch", sa.String(length=64), nullable=False),
        sa.Column("at_ns", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("gateway_id", sa.String(length=64), nullable=False),
        sa.Column("step_ns", sa.BigInteger(), nullable=False),
        sa.Column("own_ns", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("own_ns BETWEEN 0 AND step_ns", name="ck_engine_time_own"),
        sa.PrimaryKeyConstraint("epoch", "at_ns", name="pk_engine_time"),
    )
    op.create_index("ix_engine_time_at_ns", "engine_time", ["at_ns"], unique=False)
    for statement in append_only_ddl(op.get_context().dialect.name, engine_time):
        op.execute(statement)
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql(function_ddl("settle_hold_v2"))


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION settle_hold_v2")
    op.drop_table("engine_time")
    for name in reversed(EFFORT):
        op.drop_column("usage_record", name)
