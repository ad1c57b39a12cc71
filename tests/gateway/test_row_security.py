"""The second wall: on PostgreSQL, a bound transaction has no other tenant's rows, whatever its query says."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Table, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError

from audit.transparency import tables as audit_tables
from gateway.database import Database
from gateway.host.migrate import migrate
from tenancy import tables
from tenancy.accounts.one_trip import FUNCTIONS
from tenancy.row_security import RULES
from tests.fakes.byte_model import write_byte_model
from tests.fakes.hall import Hall, open_hall, world
from tests.fakes.integer_worker import IntegerWorker
from tests.servers import PostgresServer

WALLED = (*RULES, *audit_tables.OF_TENANTS)


def test_every_table_that_names_a_tenant_is_behind_the_wall() -> None:
    """A new table with tenants in it fails until it has a rule."""
    for metadata in (tables.metadata, audit_tables.metadata):
        for table in metadata.sorted_tables:
            if "tenant_id" in table.c:
                assert table in WALLED, f"{table.name}: give it a rule, here and in a migration"


def test_migrations_and_declared_tables_have_the_same_rules(postgres_server: PostgresServer) -> None:
    migrated, created = postgres_server.new_database(), postgres_server.new_database()
    migrate(migrated)

    async def policies(url: str, create: bool) -> list[tuple[str, ...]]:
        database = Database(url)
        try:
            async with database.transaction() as conn:
                if create:
                    for metadata in (tables.metadata, audit_tables.metadata):
                        await conn.run_sync(metadata.create_all)
                found = await conn.execute(
                    text(
                        "SELECT tablename, policyname, cmd, qual, with_check FROM pg_policies"
                        " WHERE schemaname = current_schema ORDER BY tablename"
                    )
                )
                rows = [tuple(map(str, row)) for row in found]
                forced = await conn.execute(
                    text(
                        "SELECT count(*) FROM pg_class WHERE relrowsecurity AND relforcerowsecurity"
                        " AND relnamespace = current_schema::regnamespace"
                    )
                )
                assert forced.scalar_one() == len(rows) == len(WALLED)
                return rows
        finally:
            await database.dispose()

    assert asyncio.run(policies(migrated, False)) == asyncio.run(policies(created, True))


@asynccontextmanager
async def busy_hall(url: str, redis: Redis, short_folder: Path, folder: Path) -> Any:
    """Both tenants have asked something, one of them under an idempotency key."""
    async with AsyncExitStack() as stack:
        worker = IntegerWorker(short_folder / "wall.sock")
        await worker.start()
        stack.push_async_callback(worker.stop)
        model = write_byte_model(folder / "model")
        hall = await stack.enter_async_context(
            open_hall(folder, redis, model, worker.path, world=world(), database_url=url)
        )
        for tenant in ("acme", "globex"):
            assert (await hall.chat(tenant=tenant, max_tokens=2)).status == 200
            body = {"model": "integer", "prompt": "x", "max_tokens": 1, "seed": 5}
            how: dict[str, Any] = {"tenant": tenant, "headers": {"idempotency-key": "k"}}
            for _ in range(2):  # run, and replayed
                assert (await hall.call("POST", "/v1/completions", body, **how)).status == 200
        await hall.check_books()
        yield hall


async def count(hall: Hall, table: Table, tenant_id: str = "") -> int:
    async with hall.services.database.read(tenant_id) as conn:
        return int((await conn.execute(select(func.count()).select_from(table))).scalar_one())


def test_a_query_that_forgets_its_tenant_sees_its_tenant_only(
    runner: asyncio.Runner, redis: Redis, postgres_server: PostgresServer, short_folder: Path, tmp_path: Path
) -> None:
    url = postgres_server.new_served_database()

    async def scenario() -> None:
        async with busy_hall(url, redis, short_folder, tmp_path) as hall:
            seen = hall.services.standing.seen
            assert seen is not None
            assert seen.row_security
            acme, globex = hall.accounts["acme"].tenant_id, hall.accounts["globex"].tenant_id
            filled = 0
            for table in WALLED:
                all_of_them = await count(hall, table)
                mine, theirs = await count(hall, table, acme), await count(hall, table, globex)
                nobodys = await count(hall, table, "ten_nobody")
                assert nobodys == 0, table.name
                assert mine + theirs == all_of_them, table.name
                assert mine == theirs, table.name  # both did the same
                filled += bool(mine)
            assert filled >= 11
            database = hall.services.database
            async with database.transaction(acme) as conn:  # no WHERE: a mistake that costs its own tenant only
                changed = await conn.execute(update(tables.account).values(balance_nano_usd=0))
                assert changed.rowcount == await count(hall, tables.account, acme)
                await conn.rollback()
            foreign = {"id": "prj_x", "tenant_id": globex, "name": "x", "created_ns": 1}
            with pytest.raises(DBAPIError, match="row-level security"):
                async with database.transaction(acme) as conn:
                    await conn.execute(insert(tables.project).values(**foreign))
            await hall.check_books()

    runner.run(scenario())


def test_what_a_request_does_for_a_tenant_is_bound(
    runner: asyncio.Runner,
    redis: Redis,
    postgres_server: PostgresServer,
    short_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a request's transactions only the one that finds out whose key it is may see everything."""
    bound: list[str] = []

    url = postgres_server.new_served_database()

    async def scenario() -> None:
        async with busy_hall(url, redis, short_folder, tmp_path) as hall:
            bind = Database._bind

            async def noted(self: Database, conn: Any, tenant_id: str) -> None:
                bound.append(tenant_id)
                await bind(self, conn, tenant_id)

            glance, one_trip = Database.glance, Database.one_trip

            @asynccontextmanager
            async def noted_glance(self: Database) -> Any:
                bound.append("")
                async with glance(self) as conn:
                    yield conn

            async def noted_trip(self: Database, text: str, arguments: tuple[Any, ...]) -> Any:
                bound.append(arguments[0])  # binds itself: see below
                return await one_trip(self, text, arguments)

            monkeypatch.setattr(Database, "_bind", noted)
            monkeypatch.setattr(Database, "glance", noted_glance)
            monkeypatch.setattr(Database, "one_trip", noted_trip)
            body = {"model": "integer", "prompt": "y", "max_tokens": 1, "seed": 5}
            for headers in ({}, {"idempotency-key": "new"}, {"idempotency-key": "new"}):
                bound.clear()
                assert (await hall.call("POST", "/v1/completions", body, headers=headers)).status == 200
                assert await hall.settler.drain(5) == 0
                assert bound.count("") <= 1, bound  # none where it was known
                assert set(bound) - {""} == {hall.accounts["acme"].tenant_id}
            monkeypatch.undo()
            await hall.check_books()

    runner.run(scenario())


def test_one_statement_binds_itself(postgres_server: PostgresServer) -> None:
    """What a hold's two functions do first is what `Database.transaction` does, for as long as their transaction."""
    url = postgres_server.new_database()
    migrate(url)

    async def scenario() -> None:
        database = Database(url)
        try:
            async with database.transaction() as conn:
                for name in FUNCTIONS:
                    number = (
                        await conn.execute(text(f"SELECT pronargs FROM pg_proc WHERE proname = '{name}'"))
                    ).first()
                    assert number is not None
                    more = ", ".join(["NULL"] * (number[0] - 1))
                    assert not (await conn.execute(text(f"SELECT {name}('ten_{name}', {more})"))).scalar_one()
                    bound = (await conn.execute(text("SELECT current_setting('bulkhead.tenant')"))).scalar_one()
                    assert bound == f"ten_{name}"
            async with database.read() as conn:
                after = text("SELECT coalesce(current_setting('bulkhead.tenant', true), '')")
                assert (await conn.execute(after)).scalar_one() == ""
        finally:
            await database.dispose()

    asyncio.run(scenario())
