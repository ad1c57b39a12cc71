"""The tables of tenancy. SQLite and PostgreSQL hold the same rows; times are ns since the epoch (UTC), money nano-USD.

Three kinds of rows:
- append-only (price, usage_record, ledger_transaction, ledger_entry, credit_use): triggers in the database refuse
  UPDATE and DELETE, so that a mistake in our code cannot rewrite history. `append_only_ddl` is the text; create_all
  installs it and the migration executes the same text.
- lifecycle (tenant, api_key, hold, operator, operator_token, idempotency_key): one state column or timestamp moves
  forward, never back.
- current values (scope_limit, budget, budget_use, account.balance_nano_usd, credit.left_nano_usd): may change; a
  balance is always the sum of its entries, a budget's figures the sums of its period's holds.
"""

from typing import Any, Final

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
    text,
)
from sqlalchemy.types import TypeDecorator

from tenancy.money import require_int

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class ExactInteger(TypeDecorator[int]):
    """BIGINT that refuses anything but an int on the way in: SQLite would store 1.5 in a BIGINT column."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> int | None:
        return None if value is None else require_int(value, "a database integer")

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:
        return None if value is None else int(value)  # PostgreSQL sums BIGINT as NUMERIC


def _id(length: int = 64) -> Column[str]:
    return Column("id", String(length), primary_key=True)


def _int(name: str, *, nullable: bool = False, **more: Any) -> Column[int]:
    return Column(name, ExactInteger(), nullable=nullable, **more)


def _ref(name: str, target: str, *, nullable: bool = False) -> Column[str]:
    return Column(name, String(64), ForeignKey(target), nullable=nullable)


organisation = Table(
    "organisation", metadata, _id(), Column("name", String(100), nullable=False, unique=True), _int("created_ns")
)

tenant = Table(
    "tenant",
    metadata,
    _id(),
    _ref("organisation_id", "organisation.id"),
    Column("name", String(100), nullable=False, unique=True),
    Column("status", String(16), nullable=False),
    _int("created_ns"),
    CheckConstraint("status IN ('active', 'suspended', 'deleted')", name="status"),
)

project = Table(
    "project",
    metadata,
    _id(),
    _ref("tenant_id", "tenant.id"),
    Column("name", String(100), nullable=False),
    _int("created_ns"),
    UniqueConstraint("tenant_id", "name"),
)

api_key = Table(
    "api_key",
    metadata,
    _id(),
    _ref("project_id", "project.id"),
    Column("public_id", String(16), nullable=False, unique=True),
    Column("secret_hmac", LargeBinary(32), nullable=False),
    Column("name", String(100), nullable=False),
    Column("scopes", Text, nullable=False),  # sorted, separated by one space
    _int("created_ns"),
    _int("expires_ns", nullable=True),
    _int("revoked_ns", nullable=True),
    Column("models", Text, nullable=True),  # the only ones it may ask for, as scopes are written; null: any
    Column("networks", Text, nullable=True),  # the only ones it may come from; null: any
    _int("last_used_ns", nullable=True),  # behind by up to a minute
    Column("tiers", Text, nullable=True),  # the only service tiers it may name; null: any
    Index(None, "project_id"),
)

# Not called "limit": that word is reserved in both databases.
scope_limit = Table(
    "scope_limit",
    metadata,
    Column("scope_kind", String(16), nullable=False),
    Column("scope_id", String(64), primary_key=True),
    _int("requests_per_minute", nullable=True),
    _int("tokens_per_minute", nullable=True),
    _int("concurrency_max", nullable=True),
    _int("updated_ns"),
    _int("weight", nullable=True),  # a tenant's share of the engine; null is 1
    _int("tokens_per_day", nullable=True),
    Column("shadow", Text, nullable=True),  # names of the limits that only watch, as scopes are written; null: none
    CheckConstraint("scope_kind IN ('organisation', 'tenant', 'project', 'key')", name="scope_kind"),
)

price = Table(
    "price",
    metadata,
    _id(),
    Column("model", String(200), nullable=False),
    _int("input_pico_usd"),
    _int("cached_input_pico_usd"),
    _int("output_pico_usd"),
    _int("request_nano_usd"),
    _int("effective_from_ns"),
    _int("created_ns"),
    Column("tier", String(16), nullable=False, server_default="default"),
    Column("currency", String(3), nullable=False, server_default="USD"),
    _int("flex_percent", server_default="100"),  # of a default row: what a tier without a row of its own costs
    _int("batch_percent", server_default="100"),
    _int("priority_percent", server_default="100"),
    _int("attempt", server_default="0"),  # how many for the same instant were withdrawn before it
    UniqueConstraint("model", "tier", "currency", "effective_from_ns", "attempt"),
    CheckConstraint("tier IN ('default', 'flex', 'batch', 'priority')", name="tier"),
    CheckConstraint(
        "input_pico_usd >= 0 AND cached_input_pico_usd >= 0 AND output_pico_usd >= 0 AND request_nano_usd >= 0",
        name="not_negative",
    ),
)

# One row per tenant and kind; the id is made of the two and the currency, so opening twice finds the first. A tenant's
# accounts have one currency, so there is no second account of a kind in another.
account = Table(
    "account",
    metadata,
    _id(128),
    _ref("tenant_id", "tenant.id"),
    Column("kind", String(16), nullable=False),
    Column("currency", String(3), nullable=False),
    _int("balance_nano_usd"),
    _int("created_ns"),
    UniqueConstraint("tenant_id", "kind", "currency"),
    Index("ux_account_one_of_a_kind", "tenant_id", "kind", unique=True),
    CheckConstraint("kind NOT IN ('credit', 'held') OR balance_nano_usd >= 0", name="never_negative"),
)

# One per scope, period and hardness; the id is made of the three, so setting one twice finds the first.
budget = Table(
    "budget",
    metadata,
    _id(128),
    _ref("tenant_id", "tenant.id"),
    Column("scope_kind", String(16), nullable=False),
    Column("scope_id", String(64), nullable=False),
    Column("period", String(16), nullable=False),
    Column("hard", Boolean, nullable=False),
    _int("limit_nano_usd"),
    _int("updated_ns"),
    CheckConstraint("scope_kind IN ('tenant', 'project', 'key')", name="scope_kind"),
    CheckConstraint("period IN ('day', 'month', 'total')", name="period"),
    CheckConstraint("limit_nano_usd >= 0", name="not_negative"),
    Index(None, "tenant_id"),
    Index(None, "scope_id"),
)

budget_use = Table(
    "budget_use",
    metadata,
    Column("budget_id", String(128), ForeignKey("budget.id"), primary_key=True),
    Column("period_start_ns", ExactInteger(), primary_key=True, autoincrement=False),
    _int("used_nano_usd"),
    _int("held_nano_usd"),
    _int("alerted_percent"),
    CheckConstraint("used_nano_usd >= 0 AND held_nano_usd >= 0", name="not_negative"),
)

ledger_transaction = Table(
    "ledger_transaction",
    metadata,
    _id(128),
    _ref("tenant_id", "tenant.id"),
    Column("kind", String(16), nullable=False),  # ledger.py has the list
    Column("hold_id", String(64), nullable=True),
    Column("memo", Text, nullable=False),
    _int("created_ns"),
    Column("corrects_id", String(128), nullable=True),  # of a refund or adjustment: the transaction that it sets right
    Index(None, "corrects_id"),
    Index(None, "tenant_id", "created_ns"),
)

ledger_entry = Table(
    "ledger_entry",
    metadata,
    Column("transaction_id", String(128), ForeignKey("ledger_transaction.id"), primary_key=True),
    Column("line", ExactInteger(), primary_key=True, autoincrement=False),
    Column("account_id", String(128), ForeignKey("account.id"), nullable=False),
    _int("amount_nano_usd"),
    Index(None, "account_id"),
)

# What the credit is made of (credits.py). left_nano_usd is always the amount less the sum of its uses.
credit = Table(
    "credit",
    metadata,
    _id(128),
    _ref("tenant_id", "tenant.id"),
    Column("kind", String(16), nullable=False),
    _int("amount_nano_usd"),
    _int("left_nano_usd"),
    _int("expires_ns", nullable=True),
    _int("created_ns"),
    CheckConstraint("kind IN ('promotional', 'paid', 'line')", name="kind"),
    CheckConstraint("left_nano_usd >= 0", name="not_negative"),
    Index(
        "ix_credit_open",
        "tenant_id",
        sqlite_where=text("left_nano_usd > 0"),
        postgresql_where=text("left_nano_usd > 0"),
    ),
)

credit_use = Table(
    "credit_use",
    metadata,
    Column("transaction_id", String(128), ForeignKey("ledger_transaction.id"), primary_key=True),
    Column("credit_id", String(128), ForeignKey("credit.id"), primary_key=True),
    _int("amount_nano_usd"),  # below zero: what came back
    Index(None, "credit_id"),
)

hold = Table(
    "hold",
    metadata,
    _id(),
    _ref("tenant_id", "tenant.id"),
    Column("request_id", String(64), nullable=False),
    _ref("price_id", "price.id"),
    _int("amount_nano_usd"),
    Column("state", String(16), nullable=False),
    _int("captured_nano_usd", nullable=True),
    _int("created_ns"),
    _int("expires_ns"),
    _int("settled_ns", nullable=True),
    Column("project_id", String(64), nullable=True),  # null: from before 0003, and not billed
    Column("key_id", String(64), nullable=True),
    Column("num_tokens", ExactInteger(), nullable=True),  # against token limits: reserved, once settled what was used
    Column("gateway_id", String(64), nullable=True),  # whose journal counts it; null: from before 0011
    Column("tier", String(16), nullable=False, server_default="default"),
    CheckConstraint("state IN ('pending', 'captured', 'voided', 'expired')", name="state"),
    CheckConstraint("(state = 'pending') = (settled_ns IS NULL)", name="settled_once"),
    CheckConstraint("captured_nano_usd IS NULL OR captured_nano_usd BETWEEN 0 AND amount_nano_usd", name="captured"),
    Index(
        "ix_hold_pending",
        "expires_ns",
        sqlite_where=text("state = 'pending'"),
        postgresql_where=text("state = 'pending'"),
    ),
    Index(None, "request_id"),
    Index(None, "tenant_id", "created_ns"),
)

# What a request took of the engine; all null where that was not measured.
EFFORT: Final = ("engine_ns", "block_ns", "num_prefill_tokens", "num_recomputed_tokens", "num_decode_steps")

usage_record = Table(
    "usage_record",
    metadata,
    Column("request_id", String(64), primary_key=True),
    _ref("tenant_id", "tenant.id"),
    _ref("project_id", "project.id"),
    _ref("key_id", "api_key.id"),
    Column("model", String(200), nullable=False),
    _int("num_prompt_tokens"),
    _int("num_cached_tokens"),
    _int("num_completion_tokens"),
    _ref("price_id", "price.id"),
    _int("amount_nano_usd"),
    _int("started_ns"),
    _int("finished_ns"),
    Column("finish_reason", String(16), nullable=False),
    Column("stream", Boolean, nullable=False),
    Column("tier", String(16), nullable=False, server_default="default"),
    _int("num_tokens_before", server_default="0"),  # where in its account's volume it began (volume.py)
    *(_int(name, nullable=True) for name in EFFORT),
    CheckConstraint("num_cached_tokens BETWEEN 0 AND num_prompt_tokens", name="cached"),
    Index(None, "tenant_id", "finished_ns"),
    Index(None, "finished_ns"),
)

idempotency_key = Table(
    "idempotency_key",
    metadata,
    Column("tenant_id", String(64), ForeignKey("tenant.id"), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_id", String(64), nullable=False),
    Column("fingerprint", LargeBinary(32), nullable=False),
    _int("created_ns"),
    _int("expires_ns"),
    Column("content_type", String(100), nullable=True),  # null, as the answer, until there is a whole one
    Column("answer", LargeBinary, nullable=True),
    CheckConstraint("(answer IS NULL) = (content_type IS NULL)", name="whole"),
    Index(None, "expires_ns"),
)

operator = Table(
    "operator",
    metadata,
    _id(),
    Column("name", String(100), nullable=False, unique=True),
    Column("password_hash", Text, nullable=False),
    _int("created_ns"),
    _int("disabled_ns", nullable=True),
)

APPEND_ONLY: Final = (price, usage_record, ledger_transaction, ledger_entry, credit_use)


def append_only_ddl(dialect: str, table: Table) -> list[str]:
    """The statements that make `table` append-only, to run one by one. `dialect` is "sqlite" or "postgresql".

    SQLite needs the third trigger because INSERT OR REPLACE deletes without firing DELETE triggers; PostgreSQL needs
    the statement trigger because TRUNCATE fires no row trigger. Dropping the table drops the triggers.
    A downgrade also drops the function tenancy_refuse_change, after the tables.
    """
    name = table.name
    if dialect == "sqlite":
        same_key = " AND ".join(f"{column.name} = NEW.{column.name}" for column in table.primary_key)
        exists = f"WHEN EXISTS (SELECT 1 FROM {name} WHERE {same_key})"  # noqa: S608 - names from our own tables
        return [
            f"CREATE TRIGGER {name}_no_{verb.lower()} BEFORE {verb} ON {name} {condition}"
            f"BEGIN SELECT RAISE(ABORT, '{name} is append-only'); END"
            for verb, condition in (("UPDATE", ""), ("DELETE", ""), ("INSERT", exists + " "))
        ]
    if dialect == "postgresql":
        function = (
            "CREATE OR REPLACE FUNCTION tenancy_refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
        )
        refuse = "EXECUTE FUNCTION tenancy_refuse_change()"
        return [
            function,
            f"CREATE TRIGGER {name}_no_change BEFORE UPDATE OR DELETE ON {name} FOR EACH ROW {refuse}",
            f"CREATE TRIGGER {name}_no_truncate BEFORE TRUNCATE ON {name} FOR EACH STATEMENT {refuse}",
        ]
    raise ValueError(f"no append-only triggers are written for {dialect!r}")


def _ddl(statement: str) -> DDL:
    return DDL(statement.replace("%", "%%"))  # type: ignore[no-untyped-call]  # it formats with %


def make_append_only(table: Table) -> None:
    """create_all installs the triggers; a migration executes append_only_ddl itself."""
    table.info["append_only"] = True
    for dialect in ("sqlite", "postgresql"):
        for statement in append_only_ddl(dialect, table):
            event.listen(table, "after_create", _ddl(statement).execute_if(dialect=dialect))


for _table in APPEND_ONLY:
    make_append_only(_table)
