"""Transactions: all or nothing, one writer at a time, and a lost database is one error."""

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from gateway.database import Database, DatabaseUnavailableError


def database(folder: Path) -> Database:
    return Database(f"sqlite+aiosqlite:///{folder / 'test.db'}")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """A connection that was given up in the middle ends in a thread of its own, which still wants to tell the loop."""

    before = set(threading.enumerate())

    async def to_the_end() -> None:
        await scenario
        async with asyncio.timeout(10):
            while any("_connection_worker" in one.name for one in set(threading.enumerate()) - before):
                await asyncio.sleep(0.01)

    asyncio.run(to_the_end())


def test_writers_never_interleave_and_failures_roll_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        db = database(tmp_path)
        async with db.transaction() as conn:
            await conn.execute(text("CREATE TABLE counter (n INTEGER)"))
            await conn.execute(text("INSERT INTO counter VALUES (0)"))

        async def add(fail: bool) -> None:
            async with db.transaction() as conn:
                n = (await conn.execute(text("SELECT n FROM counter"))).scalar_one()
                await asyncio.sleep(0)
                await conn.execute(text("UPDATE counter SET n = :n"), {"n": n + 1})
                if fail:
                    raise RuntimeError

        results = await asyncio.gather(*(add(i % 3 == 0) for i in range(30)), return_exceptions=True)
        assert sum(isinstance(r, RuntimeError) for r in results) == 10
        async with db.read() as conn:
            assert (await conn.execute(text("SELECT n FROM counter"))).scalar_one() == 20
        await db.dispose()

    run(scenario())


def test_a_cancelled_transaction_leaves_nothing_and_frees_the_lock(tmp_path: Path) -> None:
    async def scenario() -> None:
        db = database(tmp_path)
        async with db.transaction() as conn:
            await conn.execute(text("CREATE TABLE t (n INTEGER)"))
        inside = asyncio.Event()

        async def stuck() -> None:
            async with db.transaction() as conn:
                await conn.execute(text("INSERT INTO t VALUES (1)"))
                inside.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(stuck())
        await inside.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(5), db.transaction() as conn:
            assert (await conn.execute(text("SELECT count(*) FROM t"))).scalar_one() == 0
        await db.dispose()

    run(scenario())


def test_a_lost_database_is_unavailable(tmp_path: Path) -> None:
    async def scenario() -> None:
        db = Database(f"sqlite+aiosqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}")
        with pytest.raises(DatabaseUnavailableError):
            async with db.transaction():
                pass
        await db.dispose()
        gone = Database("postgresql+asyncpg://nobody@127.0.0.1:1/none")
        with pytest.raises(DatabaseUnavailableError):
            async with gone.read():
                pass
        await gone.dispose()

    run(scenario())


def test_a_full_disk_is_unavailable_and_keeps_what_was_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        db = database(tmp_path)
        async with db.transaction() as conn:
            await conn.execute(text("CREATE TABLE t (n TEXT)"))
            await conn.execute(text("INSERT INTO t VALUES ('kept')"))

        async def fill() -> None:
            async with db.transaction() as conn:
                await conn.execute(text("PRAGMA max_page_count = 2"))  # SQLite's own way to run out of room
                for _ in range(100):
                    await conn.execute(text("INSERT INTO t VALUES (:x)"), {"x": "x" * 4096})

        with pytest.raises(DatabaseUnavailableError, match="full"):
            await fill()
        await db.dispose()
        db = database(tmp_path)
        async with db.read() as conn:
            assert (await conn.execute(text("SELECT n FROM t"))).scalars().all() == ["kept"]
        await db.dispose()

    run(scenario())
