"""Quotas that outlive their store: epochs, failure policies, and what each hold counts against limits of tokens.

Nullable columns without a default: neither database rewrites the table. Holds from before count no tokens, so counters
that are rebuilt on the day of the upgrade know only what was admitted after it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("hold", sa.Column("num_tokens", sa.BigInteger(), nullable=True))
    op.add_column("hold", sa.Column("gateway_id", sa.String(64), nullable=True))
    op.create_table(
        "failure_policy",
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("slice_percent", sa.BigInteger(), nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger(), nullable=False),
        sa.Column("tokens_per_minute", sa.BigInteger(), nullable=False),
        sa.Column("concurrency_max", sa.BigInteger(), nullable=False),
        sa.Column("updated_ns", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("mode IN ('lease', 'open')", name="ck_failure_policy_mode"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_failure_policy_tenant_id_tenant"),
        sa.PrimaryKeyConstraint("tenant_id", name="pk_failure_policy"),
    )
    if op.get_bind().dialect.name == "postgresql":
        tenant = "current_setting('bulkhead.tenant', true)"
        op.execute("ALTER TABLE failure_policy ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE failure_policy FORCE ROW LEVEL SECURITY")
        op.execute(
            "CREATE POLICY failure_policy_of_tenant ON failure_policy"
            f" USING (coalesce({tenant}, '') = '' OR tenant_id = {tenant})"
        )
    op.create_table(
        "quota_epoch",
        sa.Column("organisation_id", sa.String(64), nullable=False),
        sa.Column("epoch", sa.String(64), nullable=False),
        sa.Column("strayed", sa.Boolean(), nullable=False),
        sa.Column("updated_ns", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["organisation_id"], ["organisation.id"], name="fk_quota_epoch_organisation_id_organisation"
        ),
        sa.PrimaryKeyConstraint("organisation_id", name="pk_quota_epoch"),
    )


def downgrade() -> None:
    op.drop_table("quota_epoch")
    op.drop_table("failure_policy")
    op.drop_column("hold", "gateway_id")
    op.drop_column("hold", "num_tokens")
