"""Budgets and their counters, and whose project and key a hold is.

The holds that there are get theirs from the usage row of their request. A hold without one was given back, or is
pending since a crash: it counts in the tenant's budgets only.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("project_id", "key_id"):
        op.add_column("hold", sa.Column(name, sa.String(length=64), nullable=True))
        op.execute(
            f"UPDATE hold SET {name} = (SELECT {name} FROM usage_record u WHERE u.request_id = hold.request_id)"  # noqa: S608
        )
    op.create_index("ix_hold_tenant_id_created_ns", "hold", ["tenant_id", "created_ns"], unique=False)
    op.create_table(
        "budget",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("scope_kind", sa.String(length=16), nullable=False),
        sa.Column("scope_id", sa.String(length=64), nullable=False),
        sa.Column("period", sa.String(length=16), nullable=False),
        sa.Column("hard", sa.Boolean(), nullable=False),
        sa.Column("limit_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("updated_ns", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("scope_kind IN ('tenant', 'project', 'key')", name="ck_budget_scope_kind"),
        sa.CheckConstraint("period IN ('day', 'month', 'total')", name="ck_budget_period"),
        sa.CheckConstraint("limit_nano_usd >= 0", name="ck_budget_not_negative"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_budget_tenant_id_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_budget"),
    )
    op.create_index("ix_budget_tenant_id", "budget", ["tenant_id"], unique=False)
    op.create_index("ix_budget_scope_id", "budget", ["scope_id"], unique=False)
    op.create_table(
        "budget_use",
        sa.Column("budget_id", sa.String(length=128), nullable=False),
        sa.Column("period_start_ns", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("used_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("held_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("alerted_percent", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("used_nano_usd >= 0 AND held_nano_usd >= 0", name="ck_budget_use_not_negative"),
        sa.ForeignKeyConstraint(["budget_id"], ["budget.id"], name="fk_budget_use_budget_id_budget"),
        sa.PrimaryKeyConstraint("budget_id", "period_start_ns", name="pk_budget_use"),
    )


def downgrade() -> None:
    op.drop_table("budget_use")
    op.drop_table("budget")
    op.drop_index("ix_hold_tenant_id_created_ns", table_name="hold")
    for name in ("key_id", "project_id"):
        op.drop_column("hold", name)
