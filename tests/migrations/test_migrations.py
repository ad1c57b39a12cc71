"""The migrations build exactly the tables that the rooms declare, triggers included, on both databases."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from audit import tables as audit_tables
from gateway.host.migrate import MigrationError, migrate
from tenancy import tables as tenancy_tables
from tests.servers import PostgresServer

METADATA = [tenancy_tables.metadata, audit_tables.metadata]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        yield server.new_database()


def run(url: str, work: Any) -> Any:
    async def go() -> Any:
        engine = create_async_engine(url)
        try:
            async with engine.begin() as conn:
                return await conn.run_sync(work)
        finally:
            await engine.dispose()

    return asyncio.run(go())


def test_head_equals_the_declared_tables(url: str) -> None:
    assert migrate(url) is True
    assert migrate(url) is False

    def differences(connection: Connection) -> Any:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return compare_metadata(context, merged())

    assert run(url, differences) == []


def merged() -> MetaData:
    both = MetaData()
    for metadata in METADATA:
        for table in metadata.sorted_tables:
            table.to_metadata(both)
    return both


def test_append_only_tables_refuse_changes(url: str) -> None:
    migrate(url)
    names = [table.name for table in tenancy_tables.APPEND_ONLY]

    def triggers(connection: Connection) -> set[str]:
        source = {
            "sqlite": "SELECT DISTINCT tbl_name FROM sqlite_master WHERE type = 'trigger'",
            "postgresql": "SELECT DISTINCT relname FROM pg_trigger"
            " JOIN pg_class c ON c.oid = tgrelid"
            " WHERE NOT tgisinternal AND relnamespace = current_schema::regnamespace",
        }[connection.dialect.name]
        return set(connection.execute(text(source)).scalars())

    assert run(url, triggers) == set(names)

    def tamper(connection: Connection) -> None:
        row = {
            "id": "price_1",
            "model": "m",
            "input_pico_usd": 1,
            "cached_input_pico_usd": 1,
            "output_pico_usd": 1,
            "request_nano_usd": 1,
            "effective_from_ns": 1,
            "created_ns": 1,
        }
        connection.execute(insert(tenancy_tables.price).values(row))
        connection.execute(text("UPDATE price SET input_pico_usd = 0"))

    with pytest.raises(DBAPIError, match="append-only"):
        run(url, tamper)


def test_a_database_from_the_future_is_refused(url: str) -> None:
    migrate(url)
    run(url, lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    with pytest.raises(MigrationError, match="does not know"):
        migrate(url)


def test_there_is_one_head() -> None:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "migrations:")
    assert len(ScriptDirectory.from_config(config).get_heads()) == 1
