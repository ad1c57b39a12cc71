"""Two roles as an operator sets them up: what the commands say, what the server says of itself, and when it starts."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from redis.asyncio import Redis
from typer.testing import CliRunner

from gateway.bench.http import Connection
from gateway.bench.servers import SERVER, place
from gateway.cli import app
from gateway.commands.session import CommandError
from gateway.database import Database
from gateway.host.migrate import MigrationError
from gateway.rights.standing import NoTablesError
from gateway.world import real_world
from tests.fakes.byte_model import write_byte_model
from tests.fakes.hall import open_hall, world
from tests.fakes.integer_worker import IntegerWorker
from tests.servers import PostgresServer, owner_of, serving_role_of


class Shell:
    def __init__(self, folder: Path, **environment: str) -> None:
        self.environment = {"BULKHEAD_DATA_DIR": str(folder), **environment}

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments), env=self.environment)


def test_the_commands_of_the_owner_and_of_the_server(postgres_server: PostgresServer, tmp_path: Path) -> None:
    owner = postgres_server.new_database()
    served, role = owner.replace("@", "_serves@", 1), serving_role_of(owner)
    server = Shell(tmp_path, BULKHEAD_DATABASE_URL=served)
    both = Shell(tmp_path, BULKHEAD_DATABASE_URL=served, BULKHEAD_MIGRATION_DATABASE_URL=owner)

    refused = server.run("tenant", "list")
    assert isinstance(refused.exception, MigrationError)
    assert f"bulkhead migrate --serving-role {role}" in str(refused.exception)
    nothing = server.run("migrate", "--check")
    assert isinstance(nothing.exception, NoTablesError)
    assert "run bulkhead migrate" in str(nothing.exception)
    done = both.run("migrate")  # whom the server connects as is known from its URL
    assert done.exit_code == 0, done.exception
    assert done.stdout.splitlines() == [
        "database upgraded",
        f"{role} has the rights of a server and no others; see: bulkhead migrate --check",
    ]
    assert server.run("migrate").stdout == "database is up to date\n"
    checked = server.run("migrate", "--check")
    assert (checked.exit_code, checked.stdout.splitlines()) == (
        0,
        [
            f"append-only is held by rights: {role} owns nothing and may not change what is written",
            "row-level security holds",
        ],
    )
    assert server.run("tenant", "create", "--name", "acme").exit_code == 0
    for _ in range(2):  # a limit is replaced: the row before it is deleted
        assert server.run("limits", "set", "--scope", "tenant", "--of", "acme", "--tokens-per-day", "5").exit_code == 0
    assert server.run("tenant", "suspend", "acme").exit_code == 0
    assert json.loads(server.run("tenant", "list", "--json").stdout)[0]["status"] == "suspended"

    async def grant() -> None:
        database = Database(owner)
        async with database.transaction() as conn:
            await conn.exec_driver_sql(f"GRANT UPDATE ON ledger_entry TO {role}")
            await conn.exec_driver_sql(f"REVOKE SELECT ON price FROM {role}")
        await database.dispose()

    asyncio.run(grant())
    checked = server.run("migrate", "--check")
    assert checked.exit_code == 1
    assert f"too much: {role} may UPDATE ledger_entry" in checked.stdout
    assert f"too little: {role} lacks SELECT on price" in checked.stdout
    assert Shell(tmp_path, BULKHEAD_DATABASE_URL=owner).run("migrate", "--serving-role", role).exit_code == 0
    assert server.run("migrate", "--check").exit_code == 0


def test_sqlite_says_that_triggers_hold(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    assert shell.run("migrate").exit_code == 0
    checked = shell.run("migrate", "--check")
    assert (checked.exit_code, checked.stdout) == (1, "append-only is held by triggers: SQLite has no roles\n")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_readyz_and_metrics_say_by_what_append_only_is_held(
    kind: str, runner: asyncio.Runner, redis: Redis, postgres_server: PostgresServer, short_folder: Path, tmp_path: Path
) -> None:
    url = postgres_server.new_served_database() if kind == "postgresql" else ""

    async def scenario() -> None:
        worker = IntegerWorker(short_folder / f"{kind}.sock")
        await worker.start()
        model = write_byte_model(tmp_path / "model")
        async with open_hall(tmp_path, redis, model, worker.path, world=world(), database_url=url) as hall:

            async def said() -> tuple[Any, str]:
                checks = (await hall.call("GET", "/readyz", tenant=None)).json()["checks"]
                metrics = hall.services.metrics.render().decode()
                return checks["database"], next(
                    line for line in metrics.splitlines() if line.startswith("bulkhead_database_info")
                )

            held, wall = ("rights", True) if url else ("triggers", False)
            label = 'bulkhead_database_info{append_only="%s",row_security="%s"} 1.0'
            assert await said() == (
                {"ok": True, "append_only": held, "row_security": wall},
                label % (held, "on" if wall else "off"),
            )
            if url:
                owner = Database(owner_of(url))
                async with owner.transaction() as conn:
                    await conn.exec_driver_sql(f"GRANT DELETE ON usage_record TO {serving_role_of(url)}")
                await owner.dispose()
                await hall.services.standing.look()  # as housekeeping does
                assert (await said())[0] == {"ok": True, "append_only": "triggers", "row_security": True}
        await worker.stop()

    runner.run(scenario())


def test_a_server_starts_with_the_least_rights_and_not_with_less() -> None:
    async def scenario() -> None:
        async with place(real_world()) as here:
            with pytest.raises(CommandError, match=f"bulkhead migrate --serving-role {SERVER}"):
                await here.start_gateway(0, {})
            await here.make_tables()
            database = Database(here.own_url)
            async with database.transaction() as conn:
                await conn.exec_driver_sql(f"REVOKE INSERT ON outbox FROM {SERVER}")
            with pytest.raises(CommandError, match=r"lacks rights that the server needs \(INSERT on outbox\)"):
                await here.start_gateway(0, {})
            async with database.transaction() as conn:
                await conn.exec_driver_sql(f"GRANT INSERT ON outbox TO {SERVER}")
            await database.dispose()
            gateway = await here.start_gateway(0, {})
            connection = Connection(gateway.port, gateway.tls, "")
            said = json.loads((await connection.get("/readyz")).body)["checks"]["database"]
            connection.close()
            assert said == {"ok": True, "append_only": "rights", "row_security": True}

    asyncio.run(scenario())
