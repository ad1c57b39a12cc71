"""What belongs to prices beside their rows: graduated steps, drafts, and how far each account is on those steps.

Steps and withdrawals are append-only as prices are. A draft is a current value until it is scheduled or discarded; a
volume only grows.
"""

from sqlalchemy import CheckConstraint, Column, ForeignKey, String, Table, Text

from tenancy.tables import ExactInteger, make_append_only, metadata

price_step = Table(
    "price_step",
    metadata,
    Column("price_id", String(64), ForeignKey("price.id"), primary_key=True),
    Column("from_tokens", ExactInteger(), primary_key=True, autoincrement=False),
    Column("input_pico_usd", ExactInteger(), nullable=False),
    Column("cached_input_pico_usd", ExactInteger(), nullable=False),
    Column("output_pico_usd", ExactInteger(), nullable=False),
    CheckConstraint("from_tokens > 0", name="above_the_first"),
    CheckConstraint("input_pico_usd >= 0 AND cached_input_pico_usd >= 0 AND output_pico_usd >= 0", name="not_negative"),
)
make_append_only(price_step)

price_withdrawal = Table(
    "price_withdrawal",
    metadata,
    Column("price_id", String(64), ForeignKey("price.id"), primary_key=True),
    Column("withdrawn_ns", ExactInteger(), nullable=False),
)
make_append_only(price_withdrawal)

price_draft = Table(
    "price_draft",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("model", String(200), nullable=False),
    Column("tier", String(16), nullable=False),
    Column("terms", Text, nullable=False),  # JSON of PriceTerms
    Column("created_ns", ExactInteger(), nullable=False),
    Column("ended_ns", ExactInteger(), nullable=True),
    Column("price_id", String(64), ForeignKey("price.id"), nullable=True),  # null: still a draft, or discarded
    CheckConstraint("price_id IS NULL OR ended_ns IS NOT NULL", name="scheduled_once"),
)

volume = Table(
    "volume",
    metadata,
    Column("tenant_id", String(64), ForeignKey("tenant.id"), primary_key=True),
    Column("model", String(200), primary_key=True),
    Column("tier", String(16), primary_key=True),
    Column("month_start_ns", ExactInteger(), primary_key=True, autoincrement=False),
    Column("num_tokens", ExactInteger(), nullable=False),
    CheckConstraint("num_tokens >= 0", name="not_negative"),
)
