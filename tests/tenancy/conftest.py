"""Fixtures of the tenancy tests: databases with the tables in them, a small world, a quota on a real Valkey."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway.database import Database
from tenancy import webhook_tables  # their tables are in the same metadata
from tenancy.invoicing import invoice_tables
from tenancy.tables import metadata
from tenancy.usage import engine_time
from tests.servers import PostgresServer

ALL_TABLES = (invoice_tables, webhook_tables, engine_time)
OpenDatabase = Callable[[], AbstractAsyncContextManager[Database]]
OpenRedis = Callable[[], AbstractAsyncContextManager[Redis]]


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    database = Database(url)
    try:
        yield database
    finally:
        await database.dispose()


async def create_tables(url: str) -> None:
    async with opened(url) as database, database.transaction() as conn:
        await conn.run_sync(metadata.create_all)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    url = f"sqlite+aiosqlite:///{tmp_path / 'bulkhead.db'}"
    asyncio.run(create_tables(url))
    return url


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """As a server: the role owns nothing (tests.servers.owner_of gives the owner's URL)."""
    return postgres_server.new_served_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The same test on both databases."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url


@pytest.fixture
def open_redis(valkey_socket: Path) -> Iterator[OpenRedis]:
    """A client as the gateway builds it: no retries, short timeouts. The server is emptied after the test."""

    @asynccontextmanager
    async def client() -> AsyncIterator[Redis]:
        redis = redis_client(valkey_socket)
        try:
            yield redis
        finally:
            await redis.aclose()

    yield client

    async def flush() -> None:
        async with client() as redis:
            await redis.flushall()

    asyncio.run(flush())


def redis_client(path: Path) -> Redis:
    return Redis(unix_socket_path=str(path), retry=Retry(NoBackoff(), 0), socket_timeout=5, socket_connect_timeout=1)
