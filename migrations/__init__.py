"""Alembic migrations over the tables of tenancy and audit."""
