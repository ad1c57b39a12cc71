"""Operators' tokens, for programs: a lifecycle, as api_key is."""

from sqlalchemy import Boolean, Column, ForeignKey, LargeBinary, String, Table

from tenancy.tables import ExactInteger, metadata

operator_token = Table(
    "operator_token",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("operator_id", String(64), ForeignKey("operator.id"), nullable=False, index=True),
    Column("public_id", String(16), nullable=False, unique=True),
    Column("secret_hmac", LargeBinary(32), nullable=False),
    Column("name", String(100), nullable=False),
    Column("read_only", Boolean, nullable=False),
    Column("created_ns", ExactInteger(), nullable=False),
    Column("expires_ns", ExactInteger(), nullable=True),
    Column("revoked_ns", ExactInteger(), nullable=True),
    Column("last_used_ns", ExactInteger(), nullable=True),
)
