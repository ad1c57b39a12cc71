"""Connections for single statements: what ends one, and that no more are opened than may be."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import asyncpg
import pytest

from gateway import trips
from gateway.database import Database, DatabaseUnavailableError
from tests.servers import PostgresServer

PID = "SELECT pg_backend_pid()"


@pytest.fixture
def database(runner: asyncio.Runner, postgres_server: PostgresServer) -> Iterator[Database]:
    one = Database(postgres_server.new_database())
    yield one
    runner.run(one.dispose())


async def kill(server: PostgresServer, pid: int) -> None:
    await server.execute(f"SELECT pg_terminate_backend({pid}, 5000)")


def test_one_connection_serves_one_after_the_other(database: Database, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        pids = {await database.one_trip(PID, ()) for _ in range(5)}
        with pytest.raises(asyncpg.DivisionByZeroError):
            await database.one_trip("SELECT 1 / $1::int", (0,))
        with pytest.raises(asyncpg.DataError):
            await database.one_trip("SELECT $1::int", ("text",))  # never sent
        assert await database.one_trip("SELECT $1::int + 1", (1,)) == 2
        assert len(pids) == 1

    runner.run(scenario())


def test_a_connection_that_the_server_has_closed_is_not_used(
    database: Database, runner: asyncio.Runner, postgres_server: PostgresServer
) -> None:
    async def scenario() -> None:
        first = await database.one_trip(PID, ())
        await kill(postgres_server, first)
        await asyncio.sleep(0.05)
        assert await database.one_trip(PID, ()) != first

    runner.run(scenario())


def test_a_server_that_goes_in_the_middle_is_unavailable(
    database: Database, runner: asyncio.Runner, postgres_server: PostgresServer
) -> None:
    async def scenario() -> None:
        pid = await database.one_trip(PID, ())
        waiting = asyncio.create_task(database.one_trip("SELECT pg_sleep(30)", ()))
        await asyncio.sleep(0.1)
        await kill(postgres_server, pid)
        with pytest.raises(DatabaseUnavailableError):
            await waiting
        assert await database.one_trip("SELECT 7", ()) == 7

    runner.run(scenario())


def test_one_that_was_cancelled_in_the_middle_answers_nobody_else(database: Database, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        for _ in range(15):  # more often than there are places
            task = asyncio.create_task(database.one_trip("SELECT pg_sleep(5), 1", ()))
            await asyncio.sleep(0.01)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert await database.one_trip("SELECT 2", ()) == 2

    runner.run(scenario())


def test_no_more_are_open_than_may_be(
    database: Database, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        slow = "SELECT pg_backend_pid() FROM pg_sleep(0.02)"
        pids = await asyncio.gather(*(database.one_trip(slow, ()) for _ in range(40)))
        assert 1 < len(set(pids)) <= trips.CONNECTIONS_MAX
        monkeypatch.setattr(trips, "WAIT_S", 0.05)
        many = (database.one_trip("SELECT pg_sleep(0.3)", ()) for _ in range(trips.CONNECTIONS_MAX + 3))
        found = await asyncio.gather(*many, return_exceptions=True)
        assert sum(isinstance(one, DatabaseUnavailableError) for one in found) == 3

    runner.run(scenario())


def test_a_server_that_is_not_there_is_unavailable(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        database = Database("postgresql+asyncpg://nobody@/postgres?host=/nowhere")
        with pytest.raises(DatabaseUnavailableError):
            await database.one_trip("SELECT 1", ())
        await database.dispose()

    runner.run(scenario())
