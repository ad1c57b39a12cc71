"""One event loop and one Valkey for each module; a hall with an integer worker on request."""

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from gateway.host.valkey import connect_redis, valkey_child
from tests.fakes.byte_model import write_byte_model
from tests.fakes.hall import Hall, open_hall, world
from tests.fakes.integer_worker import IntegerWorker
from tests.servers import PostgresServer, postgres_server

__all__ = ["postgres_server"]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as one:
        yield one


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """For sockets, whose paths may have 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="bh-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def redis(runner: asyncio.Runner, short_folder: Path) -> Iterator[Redis]:
    async def start() -> tuple[object, Redis]:
        child = valkey_child(short_folder / "valkey", short_folder / "valkey.sock", {})
        await child.start()
        return child, connect_redis(f"unix://{short_folder / 'valkey.sock'}")

    child, client = runner.run(start())

    async def stop() -> None:
        await client.aclose()
        await child.stop(2.0)  # type: ignore[attr-defined]

    yield client
    runner.run(stop())


class Stage:
    """A worker and a hall that uses it; `make` may be called several times."""

    def __init__(
        self,
        runner: asyncio.Runner,
        redis: Redis,
        folder: Path,
        short_folder: Path,
        new_database: Callable[[], str] = lambda: "",
    ) -> None:
        self._runner = runner
        self._new_database = new_database
        self._redis = redis
        self._folder = folder
        self._short_folder = short_folder
        self._stack = AsyncExitStack()
        self._num = 0

    def make(self, *, context_max: int = 256, **settings: Any) -> tuple[Hall, IntegerWorker]:
        settings.setdefault("database_url", self._new_database())
        return self._runner.run(self._make(context_max, settings))

    async def _make(self, context_max: int, settings: dict[str, Any]) -> tuple[Hall, IntegerWorker]:
        self._num += 1
        folder = self._folder / f"hall-{self._num}"
        folder.mkdir()
        model = write_byte_model(folder / "model", context_max=context_max)
        worker = IntegerWorker(
            self._short_folder / f"{folder.parent.name[-8:]}-{self._num}.sock", context_max=context_max
        )
        await worker.start()
        self._stack.push_async_callback(worker.stop)
        hall = await self._stack.enter_async_context(
            open_hall(folder, self._redis, model, worker.path, world=world(), **settings)
        )
        return hall, worker

    def close(self) -> None:
        self._runner.run(self._stack.aclose())


@pytest.fixture(scope="session")
def new_database(request: pytest.FixtureRequest) -> Callable[[], str]:
    """The URL of a database for each hall: SQLite in its folder (""), or PostgreSQL, as a role that owns nothing, where
    BULKHEAD_TEST_DATABASE=postgresql asks for it, as make test-all does in a second run."""
    if os.environ.get("BULKHEAD_TEST_DATABASE") != "postgresql":
        return lambda: ""
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.new_served_database


@pytest.fixture
def stage(
    runner: asyncio.Runner, redis: Redis, tmp_path: Path, short_folder: Path, new_database: Callable[[], str]
) -> Iterator[Stage]:
    one = Stage(runner, redis, tmp_path, short_folder, new_database)
    yield one
    one.close()


@pytest.fixture(scope="module")
def shared_stage(
    runner: asyncio.Runner,
    redis: Redis,
    tmp_path_factory: pytest.TempPathFactory,
    short_folder: Path,
    new_database: Callable[[], str],
) -> Iterator[Stage]:
    one = Stage(runner, redis, tmp_path_factory.mktemp("shared"), short_folder, new_database)
    yield one
    one.close()
