"""Beside the limits: what happens while their store is gone, and which counters are the right ones."""

from sqlalchemy import Boolean, CheckConstraint, Column, ForeignKey, String, Table

from tenancy.tables import ExactInteger, metadata

# What happens to a tenant's requests while the store of quotas is gone; no row: nothing is served then.
failure_policy = Table(
    "failure_policy",
    metadata,
    Column("tenant_id", String(64), ForeignKey("tenant.id"), primary_key=True),
    Column("mode", String(16), nullable=False),
    Column("slice_percent", ExactInteger(), nullable=False),
    Column("requests_per_minute", ExactInteger(), nullable=False),
    Column("tokens_per_minute", ExactInteger(), nullable=False),
    Column("concurrency_max", ExactInteger(), nullable=False),
    Column("updated_ns", ExactInteger(), nullable=False),
    CheckConstraint("mode IN ('lease', 'open')", name="mode"),
)

# The name of the counters in the store that are those of an organisation (quota_epochs.py).
quota_epoch = Table(
    "quota_epoch",
    metadata,
    Column("organisation_id", String(64), ForeignKey("organisation.id"), primary_key=True),
    Column("epoch", String(64), nullable=False),
    Column("strayed", Boolean, nullable=False),  # a policy has admitted what its counters do not know
    Column("updated_ns", ExactInteger(), nullable=False),
)
