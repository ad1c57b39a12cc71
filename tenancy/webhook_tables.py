"""Where events go: endpoints, and what was sent to them. Current values and lifecycles; facts stay in the log."""

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, String, Table, Text, UniqueConstraint, text

from tenancy.tables import ExactInteger, metadata

webhook_endpoint = Table(
    "webhook_endpoint",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), ForeignKey("tenant.id"), nullable=True),  # null: the operator's, sees everything
    Column("url", Text, nullable=False),
    Column("kinds", Text, nullable=False),  # of log entries; sorted, separated by one space
    Column("next_leaf_index", ExactInteger(), nullable=False),  # of the log: everything before was looked at
    Column("created_ns", ExactInteger(), nullable=False),
    Column("ended_ns", ExactInteger(), nullable=True),
    Column("end_reason", Text, nullable=True),
    CheckConstraint("(ended_ns IS NULL) = (end_reason IS NULL)", name="ended_once"),
)

webhook_delivery = Table(
    "webhook_delivery",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("endpoint_id", String(64), ForeignKey("webhook_endpoint.id"), nullable=False),
    Column("leaf_index", ExactInteger(), nullable=False),  # the event: an entry of the log
    Column("kind", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("num_attempts", ExactInteger(), nullable=False),
    Column("next_attempt_ns", ExactInteger(), nullable=False),  # while pending; also how long a sender has claimed it
    Column("created_ns", ExactInteger(), nullable=False),
    Column("updated_ns", ExactInteger(), nullable=False),
    Column("last_status", ExactInteger(), nullable=True),  # HTTP; null where there was no answer
    Column("last_error", Text, nullable=False),
    UniqueConstraint("endpoint_id", "leaf_index"),
    CheckConstraint("state IN ('pending', 'delivered', 'dead')", name="state"),
    Index(
        "ix_webhook_delivery_pending",
        "next_attempt_ns",
        sqlite_where=text("state = 'pending'"),
        postgresql_where=text("state = 'pending'"),
    ),
    Index(None, "updated_ns"),
)
