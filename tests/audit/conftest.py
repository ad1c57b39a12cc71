"""Databases and keys for the log's tests: SQLite files, and an empty PostgreSQL schema a test."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from audit.transparency.keyring import Keyring, load_keyring
from tests.servers import PostgresServer

ORIGIN = "test.example/log"


def seeded(seed: int) -> Callable[[int], bytes]:
    """Entropy that repeats: a test's log is the same on every run."""
    return random.Random(seed).randbytes


@pytest.fixture(scope="session")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return load_keyring(tmp_path_factory.mktemp("keys") / "keys", origin=ORIGIN, entropy=seeded(1))


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'audit.db'}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.new_database()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path / 'audit.db'}"
