"""Database connections: the one place where transactions begin and end.

SQLite has one writer. Writers therefore queue on a lock in this process and start with BEGIN IMMEDIATE, so that a
transaction never discovers half-way that it cannot write. Readers run beside them (WAL). On PostgreSQL both are
plain transactions, and one that is bound to a tenant sees no other tenant's rows (tenancy/row_security.py).
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from gateway.trips import Trips

# No ping before each use: three of them would be a tenth of a request. A connection that has died is noticed when it is
# used; that request gets 503 and Retry-After, and the whole pool is made anew.
POOL: dict[str, Any] = {"pool_size": 5, "max_overflow": 10, "pool_timeout": 5}  # beside trips.CONNECTIONS_MAX
SQLITE_POOL: dict[str, Any] = {"pool_timeout": 5}
_BIND = text("SELECT set_config('bulkhead.tenant', :tenant_id, true)")  # true: until the transaction ends
BUSY_TIMEOUT_MS = 5_000  # how long a SQLite writer waits for another process (a CLI command) to finish

# SQLSTATE: connection lost, rolled back (deadlock, serialisation), out of resources, lock not available, cancelled or
# going down, input or output failed, read-only.
PASSING = ("08", "40", "53", "55P03", "57", "58", "25006")


class DatabaseUnavailableError(Exception):
    """The database cannot be reached or refuses to write. The caller answers 503 and serves nothing unmetered."""


class Database:
    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        # A write in WAL costs one fsync: FULL is kept because this file is a ledger.
        self._engine: AsyncEngine = create_async_engine(url, **(SQLITE_POOL if self.is_sqlite else POOL))
        self._autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")  # the same pool
        self._trips = None if self.is_sqlite else Trips(url)
        self._write_lock = asyncio.Lock() if self.is_sqlite else None
        if self.is_sqlite:
            _prepare_sqlite(self._engine)

    @asynccontextmanager
    async def transaction(self, tenant_id: str = "") -> AsyncIterator[AsyncConnection]:
        """A read-write transaction: commits on normal exit, rolls back on any exception. ``tenant_id`` binds it."""
        async with self._write_lock or nullcontext():
            with _mapped_errors():
                async with self._engine.connect() as conn:
                    if self.is_sqlite:
                        await conn.exec_driver_sql("BEGIN IMMEDIATE")
                    async with _committing(conn):
                        await self._bind(conn, tenant_id)
                        yield conn

    @asynccontextmanager
    async def glance(self) -> AsyncIterator[AsyncConnection]:
        """For one statement that reads: nothing begins or ends around it on PostgreSQL. Not bound."""
        if self.is_sqlite:
            async with self.read() as conn:
                yield conn
            return
        with _mapped_errors():
            async with self._autocommit.connect() as conn:
                yield conn

    @asynccontextmanager
    async def read(self, tenant_id: str = "") -> AsyncIterator[AsyncConnection]:
        """A consistent snapshot for reading; always rolled back. ``tenant_id`` binds it."""
        with _mapped_errors():
            async with self._engine.connect() as conn:
                if self.is_sqlite:
                    await conn.exec_driver_sql("BEGIN")
                try:
                    await self._bind(conn, tenant_id)
                    yield conn
                finally:
                    await conn.rollback()

    async def one_trip(self, text: str, arguments: tuple[object, ...]) -> Any:
        """One statement that is a transaction of its own, on PostgreSQL; the value that it gives. No transaction is
        begun and ended around it, so it binds itself where it has to (tenancy/accounts/one_trip.py)."""
        assert self._trips is not None, "SQLite has no server to spare trips to"
        with _mapped_errors():
            return await self._trips.value(text, arguments)

    async def _bind(self, conn: AsyncConnection, tenant_id: str) -> None:
        if tenant_id and not self.is_sqlite:
            await conn.execute(_BIND, {"tenant_id": tenant_id})

    async def dispose(self) -> None:
        if self._trips is not None:
            await self._trips.close()
        await self._engine.dispose()


@asynccontextmanager
async def _committing(conn: AsyncConnection) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        await conn.rollback()
        raise
    await conn.commit()


class _mapped_errors:
    """The one table from driver errors to ours: lost, locked, full or read-only databases are unavailable."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OperationalError | InterfaceError | sqlite3.OperationalError | OSError | TimeoutError):
            raise DatabaseUnavailableError(_reason(error)) from error
        if isinstance(error, PoolTimeoutError):  # every connection is in use, and none came back in time
            raise DatabaseUnavailableError(_reason(error)) from error
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            raise DatabaseUnavailableError(_reason(error)) from error
        if isinstance(error, Exception) and _is_passing(error):
            raise DatabaseUnavailableError(_reason(error)) from error


def _is_passing(error: Exception) -> bool:
    """What PostgreSQL refuses now and may do later, although nothing is wrong with the statement."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return str(getattr(cause, "sqlstate", None) or "").startswith(PASSING)


def _reason(error: BaseException) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return f"{type(cause).__name__}: {cause}".splitlines()[0]


def _prepare_sqlite(engine: AsyncEngine) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's own BEGIN below; the driver must not add another
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "foreign_keys=ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()
