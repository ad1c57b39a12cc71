"""Alembic's environment: both rooms' tables, SQLite and PostgreSQL, one upgrade at a time.

On PostgreSQL an advisory lock keeps replicas that start together apart, and a lock timeout keeps a migration from
queueing behind (and thereby stopping) live traffic. On SQLite the transaction itself is the lock.
"""

import asyncio

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine

from audit.transparency import tables as audit_tables
from tenancy import row_security as row_security  # and with it all tables that are in the same metadata
from tenancy import tables as tenancy_tables
from tenancy.access import token_tables as token_tables  # no tenant's, so row_security does not know it

ADVISORY_LOCK = 0x62756C6B68656164  # "bulkhead"
LOCK_TIMEOUT_MS = 4_000
TARGETS = [tenancy_tables.metadata, audit_tables.metadata]


def upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SET lock_timeout = {LOCK_TIMEOUT_MS}"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
    else:
        # The driver would begin at the first INSERT: a table that was dropped before a failure would stay dropped.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    context.configure(
        connection=connection,
        target_metadata=TARGETS,
        render_as_batch=connection.dialect.name == "sqlite",
        transactional_ddl=True,
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        context.run_migrations()
        then = context.config.attributes.get("then")
        if then is not None:  # the hall's part: grants, in the same transaction
            then(connection)


async def main() -> None:
    engine = create_async_engine(context.config.attributes["url"])
    try:
        async with engine.begin() as conn:
            await conn.run_sync(upgrade)
    finally:
        await engine.dispose()


asyncio.run(main())
