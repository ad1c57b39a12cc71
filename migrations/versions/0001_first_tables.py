"""The first tables of tenancy and audit, and the triggers that make money and history append-only."""

import sqlalchemy as sa
from alembic import op

from tenancy.tables import append_only_ddl, metadata

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

APPEND_ONLY = ("price", "usage_record", "ledger_transaction", "ledger_entry")


def upgrade() -> None:
    _create_tenancy()
    _create_audit()
    for name in APPEND_ONLY:
        for statement in append_only_ddl(op.get_context().dialect.name, metadata.tables[name]):
            op.execute(statement)


def downgrade() -> None:
    raise RuntimeError("the first revision holds a ledger and a log: drop the database yourself if you mean it")


def _create_tenancy() -> None:
    op.create_table(
        "operator",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("disabled_ns", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_operator"),
        sa.UniqueConstraint("name", name="uq_operator_name"),
    )
    op.create_table(
        "organisation",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_organisation"),
        sa.UniqueConstraint("name", name="uq_organisation_name"),
    )
    op.create_table(
        "price",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("input_pico_usd", sa.BigInteger(), nullable=False),
        sa.Column("cached_input_pico_usd", sa.BigInteger(), nullable=False),
        sa.Column("output_pico_usd", sa.BigInteger(), nullable=False),
        sa.Column("request_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("effective_from_ns", sa.BigInteger(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "input_pico_usd >= 0 AND cached_input_pico_usd >= 0 AND output_pico_usd >= 0 AND request_nano_usd >= 0",
            name="ck_price_not_negative",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_price"),
        sa.UniqueConstraint("model", "effective_from_ns", name="uq_price_model_effective_from_ns"),
    )
    op.create_table(
        "scope_limit",
        sa.Column("scope_kind", sa.String(length=16), nullable=False),
        sa.Column("scope_id", sa.String(length=64), nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("tokens_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("concurrency_max", sa.BigInteger(), nullable=True),
        sa.Column("updated_ns", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "scope_kind IN ('organisation', 'tenant', 'project', 'key')", name="ck_scope_limit_scope_kind"
        ),
        sa.PrimaryKeyConstraint("scope_id", name="pk_scope_limit"),
    )
    op.create_table(
        "tenant",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("organisation_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("status IN ('active', 'suspended', 'deleted')", name="ck_tenant_status"),
        sa.ForeignKeyConstraint(
            ["organisation_id"], ["organisation.id"], name="fk_tenant_organisation_id_organisation"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_tenant"),
        sa.UniqueConstraint("name", name="uq_tenant_name"),
    )
    op.create_table(
        "account",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("balance_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind NOT IN ('credit', 'held') OR balance_nano_usd >= 0", name="ck_account_never_negative"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_account_tenant_id_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_account"),
        sa.UniqueConstraint("tenant_id", "kind", "currency", name="uq_account_tenant_id_kind_currency"),
    )
    op.create_table(
        "hold",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("price_id", sa.String(length=64), nullable=False),
        sa.Column("amount_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("captured_nano_usd", sa.BigInteger(), nullable=True),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("expires_ns", sa.BigInteger(), nullable=False),
        sa.Column("settled_ns", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("(state = 'pending') = (settled_ns IS NULL)", name="ck_hold_settled_once"),
        sa.CheckConstraint("state IN ('pending', 'captured', 'voided', 'expired')", name="ck_hold_state"),
        sa.CheckConstraint(
            "captured_nano_usd IS NULL OR captured_nano_usd BETWEEN 0 AND amount_nano_usd",
            name="ck_hold_captured",
        ),
        sa.ForeignKeyConstraint(["price_id"], ["price.id"], name="fk_hold_price_id_price"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_hold_tenant_id_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_hold"),
    )
    op.create_index(
        "ix_hold_pending",
        "hold",
        ["expires_ns"],
        unique=False,
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index("ix_hold_request_id", "hold", ["request_id"], unique=False)
    op.create_table(
        "ledger_transaction",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("hold_id", sa.String(length=64), nullable=True),
        sa.Column("memo", sa.Text(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_ledger_transaction_tenant_id_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_ledger_transaction"),
    )
    op.create_index(
        "ix_ledger_transaction_tenant_id_created_ns",
        "ledger_transaction",
        ["tenant_id", "created_ns"],
        unique=False,
    )
    op.create_table(
        "project",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_project_tenant_id_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_project"),
        sa.UniqueConstraint("tenant_id", "name", name="uq_project_tenant_id_name"),
    )
    op.create_table(
        "api_key",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("public_id", sa.String(length=16), nullable=False),
        sa.Column("secret_hmac", sa.LargeBinary(length=32), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("expires_ns", sa.BigInteger(), nullable=True),
        sa.Column("revoked_ns", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name="fk_api_key_project_id_project"),
        sa.PrimaryKeyConstraint("id", name="pk_api_key"),
        sa.UniqueConstraint("public_id", name="uq_api_key_public_id"),
    )
    op.create_index("ix_api_key_project_id", "api_key", ["project_id"], unique=False)
    op.create_table(
        "ledger_entry",
        sa.Column("transaction_id", sa.String(length=128), nullable=False),
        sa.Column("line", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("account_id", sa.String(length=128), nullable=False),
        sa.Column("amount_nano_usd", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name="fk_ledger_entry_account_id_account"),
        sa.ForeignKeyConstraint(
            ["transaction_id"],
            ["ledger_transaction.id"],
            name="fk_ledger_entry_transaction_id_ledger_transaction",
        ),
        sa.PrimaryKeyConstraint("transaction_id", "line", name="pk_ledger_entry"),
    )
    op.create_index("ix_ledger_entry_account_id", "ledger_entry", ["account_id"], unique=False)
    op.create_table(
        "usage_record",
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("num_prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("price_id", sa.String(length=64), nullable=False),
        sa.Column("amount_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("started_ns", sa.BigInteger(), nullable=False),
        sa.Column("finished_ns", sa.BigInteger(), nullable=False),
        sa.Column("finish_reason", sa.String(length=16), nullable=False),
        sa.Column("stream", sa.Boolean(), nullable=False),
        sa.CheckConstraint("num_cached_tokens BETWEEN 0 AND num_prompt_tokens", name="ck_usage_record_cached"),
        sa.ForeignKeyConstraint(["key_id"], ["api_key.id"], name="fk_usage_record_key_id_api_key"),
        sa.ForeignKeyConstraint(["price_id"], ["price.id"], name="fk_usage_record_price_id_price"),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name="fk_usage_record_project_id_project"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name="fk_usage_record_tenant_id_tenant"),
        sa.PrimaryKeyConstraint("request_id", name="pk_usage_record"),
    )
    op.create_index("ix_usage_record_finished_ns", "usage_record", ["finished_ns"], unique=False)
    op.create_index("ix_usage_record_tenant_id_finished_ns", "usage_record", ["tenant_id", "finished_ns"], unique=False)


def _create_audit() -> None:
    op.create_table(
        "checkpoint",
        sa.Column("num_leaves", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("root", sa.LargeBinary(), nullable=False),
        sa.Column("at_ns", sa.BigInteger(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("num_leaves", name="pk_checkpoint"),
    )
    op.create_table(
        "log_leaf",
        sa.Column("leaf_index", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("outbox_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("at_ns", sa.BigInteger(), nullable=False),
        sa.Column("pseudonym", sa.Text(), nullable=False),
        sa.Column("leaf", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("leaf_index", name="pk_log_leaf"),
        sa.UniqueConstraint("outbox_id", name="uq_log_leaf_outbox_id"),
    )
    op.create_index("ix_log_leaf_at_ns", "log_leaf", ["at_ns"], unique=False)
    op.create_index("ix_log_leaf_kind_at_ns", "log_leaf", ["kind", "at_ns"], unique=False)
    op.create_table(
        "log_state",
        sa.Column("id", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("num_runs", sa.BigInteger(), nullable=False),
        sa.Column("num_leaves", sa.BigInteger(), nullable=False),
        sa.Column("frontier", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_log_state"),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("version", sa.SmallInteger(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("at_ns", sa.BigInteger(), nullable=False),
        sa.Column("nonce", sa.LargeBinary(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "log_opening",
        sa.Column("leaf_index", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("nonce", sa.LargeBinary(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["leaf_index"], ["log_leaf.leaf_index"], name="fk_log_opening_leaf_index_log_leaf"),
        sa.PrimaryKeyConstraint("leaf_index", name="pk_log_opening"),
    )
