"""The migrations build exactly the tables that the rooms declare, triggers included, on both databases."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from audit.transparency import tables as audit_tables
from gateway.host.migrate import MigrationError, migrate
from tenancy import tables as tenancy_tables
from tenancy import webhook_tables
from tenancy.access import token_tables
from tenancy.invoicing import invoice_tables
from tenancy.pricing import price_tables
from tenancy.usage import engine_time
from tests.servers import PostgresServer

# imported: they add to the metadata
TABLES = (engine_time, invoice_tables, price_tables, token_tables, webhook_tables)
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
    differences_are_none(url)


def differences_are_none(url: str) -> None:
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
    names = [table.name for table in tenancy_tables.metadata.sorted_tables if table.info.get("append_only")]
    assert {"price", "price_step", "usage_record", "ledger_entry", "invoice_document"} <= set(names)

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
    config = Config()
    config.set_main_option("script_location", "migrations:")
    assert len(ScriptDirectory.from_config(config).get_heads()) == 1


def test_credit_from_before_there_were_credits_is_one_paid_credit(url: str) -> None:
    migrate(url)
    config = Config()
    config.set_main_option("script_location", "migrations:")
    config.attributes["url"] = url
    command.downgrade(config, "0005")

    def fill(connection: Connection) -> None:
        for statement in BILLED_HOLD.split(";")[:2]:
            connection.execute(text(statement))
        for kind, balance in (("credit", 70), ("held", 30), ("funding", -120), ("revenue", 20)):
            connection.execute(
                text(f"INSERT INTO account VALUES ('ten_1:{kind}:USD', 'ten_1', '{kind}', 'USD', {balance}, 1)")
            )

    def credits(connection: Connection) -> list[Any]:
        return [tuple(row) for row in connection.execute(select(tenancy_tables.credit))]

    run(url, fill)
    command.upgrade(config, "head")
    assert run(url, credits) == [("ten_1:opening", "ten_1", "paid", 100, 100, None, 1)]


# One of each row that a billed hold needs, without the columns of 0003.
BILLED_HOLD = """
INSERT INTO organisation (id, name, created_ns) VALUES ('org_1', 'o', 1);
INSERT INTO tenant (id, organisation_id, name, status, created_ns) VALUES ('ten_1', 'org_1', 't', 'active', 1);
INSERT INTO project (id, tenant_id, name, created_ns) VALUES ('proj_1', 'ten_1', 'p', 1);
INSERT INTO api_key (id, project_id, public_id, secret_hmac, name, scopes, created_ns)
    VALUES ('key_1', 'proj_1', 'public', '\\x00', 'k', 'inference', 1);
INSERT INTO price (id, model, input_pico_usd, cached_input_pico_usd, output_pico_usd, request_nano_usd,
    effective_from_ns, created_ns) VALUES ('price_1', 'm', 1, 1, 1, 1, 1, 1);
INSERT INTO hold (id, tenant_id, request_id, price_id, amount_nano_usd, state, captured_nano_usd, created_ns,
    expires_ns, settled_ns) VALUES ('hold_1', 'ten_1', 'req_1', 'price_1', 9, 'captured', 5, 1, 9, 2);
INSERT INTO usage_record (request_id, tenant_id, project_id, key_id, model, num_prompt_tokens, num_cached_tokens,
    num_completion_tokens, price_id, amount_nano_usd, started_ns, finished_ns, finish_reason, stream)
    VALUES ('req_1', 'ten_1', 'proj_1', 'key_1', 'm', 1, 0, 1, 'price_1', 5, 1, 2, 'stop', true);
"""


def test_budgets_go_down_and_up_again(url: str) -> None:
    """0003 with a billed hold in the database: its project and key are filled in again on the way up."""
    migrate(url)

    def fill(connection: Connection) -> None:
        for statement in BILLED_HOLD.split(";")[:-1]:
            connection.execute(text(statement))

    def owners(connection: Connection) -> list[Any]:
        return [tuple(row) for row in connection.execute(text("SELECT project_id, key_id FROM hold"))]

    run(url, fill)
    config = Config()
    config.set_main_option("script_location", "migrations:")
    config.attributes["url"] = url
    command.downgrade(config, "0002")
    command.upgrade(config, "head")
    assert run(url, owners) == [("proj_1", "key_1")]


def scripts(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", "migrations:")
    config.attributes["url"] = url
    return config


def test_every_revision_goes_down_and_up_again(url: str) -> None:
    """One by one to the first and back, with a billed hold: each step leaves what the next one expects."""
    migrate(url)
    config = scripts(url)
    count = len(list(ScriptDirectory.from_config(config).walk_revisions()))
    run(url, lambda connection: [connection.execute(text(one)) for one in BILLED_HOLD.split(";")[:-1]])
    for _ in range(count - 1):
        command.downgrade(config, "-1")
    rows = "SELECT count(*) FROM hold JOIN usage_record USING (request_id)"
    assert run(url, lambda connection: connection.execute(text(rows)).scalar()) == 1
    for _ in range(count - 1):
        command.upgrade(config, "+1")
    assert run(url, lambda connection: connection.execute(text(rows)).scalar()) == 1
    differences_are_none(url)


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        ("INSERT INTO price_withdrawal (price_id, withdrawn_ns) VALUES ('price_1', 1)", "withdrawn"),
        (
            (
                "INSERT INTO credit (id, tenant_id, kind, amount_nano_usd, left_nano_usd, created_ns)"
                " VALUES ('ten_1:line', 'ten_1', 'line', 1, 1, 1)"
            ),
            "ck_credit_kind",
        ),
    ],
)
def test_what_the_version_before_would_misread_is_kept_from_it(url: str, planted: str, reason: str) -> None:
    """0015 does not go down where there is a withdrawn price or a credit line, and nothing of it is half done."""
    migrate(url)
    run(url, lambda connection: [connection.execute(text(one)) for one in [*BILLED_HOLD.split(";")[:-1], planted]])
    with pytest.raises(Exception, match=reason):
        command.downgrade(scripts(url), "0014")
    differences_are_none(url)


def test_a_migration_does_not_wait_behind_a_lock(postgres_server: PostgresServer) -> None:
    """Traffic holds a table: the upgrade gives up within its timeout, changes nothing and says why; then it works."""
    url = postgres_server.new_database()
    migrate(url)
    command.downgrade(scripts(url), "0014")

    async def blocked() -> float:
        engine = create_async_engine(url)
        try:
            async with engine.begin() as conn:
                await conn.execute(text("LOCK TABLE account IN ROW EXCLUSIVE MODE"))
                began = time.monotonic()
                with pytest.raises(MigrationError, match="lock timeout"):
                    await asyncio.to_thread(migrate, url)
                return time.monotonic() - began
        finally:
            await engine.dispose()

    assert asyncio.run(blocked()) < 10
    revision = "SELECT version_num FROM alembic_version"
    assert run(url, lambda connection: connection.execute(text(revision)).scalar()) == "0014"
    migrate(url)
    differences_are_none(url)


def test_what_was_paid_as_a_whole_is_one_payment(url: str) -> None:
    """And an invoice that is paid in part cannot go back to where it would be asked for as a whole."""
    migrate(url)
    config = scripts(url)
    command.downgrade(config, "0016")
    of_invoice = (
        "INSERT INTO issuer VALUES ('iss_1', 'i', '', '', '', 'I', 3, 14, 1)",
        "INSERT INTO invoice VALUES ('inv_1', 'iss_1', 'ten_1', 'invoice', NULL, 'paid', 1, 2, 3, 4, 5, 6, 'wire')",
        "INSERT INTO invoice VALUES ('inv_2', 'iss_1', 'ten_1', 'invoice', NULL, 'issued', 2, 3, 3, 4, 5, NULL, NULL)",
        """INSERT INTO invoice_document VALUES ('inv_1', 'iss_1', 1, '{"due_minor": 71}', 'x')""",
        """INSERT INTO invoice_document VALUES ('inv_2', 'iss_1', 2, '{"due_minor": 5}', 'x')""",
    )
    statements = [*BILLED_HOLD.split(";")[:2], *of_invoice]
    run(url, lambda connection: [connection.exec_driver_sql(one) for one in statements])
    command.upgrade(config, "head")

    def payments(connection: Connection) -> list[Any]:
        return [tuple(row) for row in connection.execute(select(invoice_tables.invoice_payment))]

    assert run(url, payments) == [("inv_1:paid", "inv_1", "ten_1", 71, "wire", 6)]
    command.downgrade(config, "0016")
    command.upgrade(config, "head")
    part = "INSERT INTO invoice_payment VALUES ('part', 'inv_2', 'ten_1', 1, '', 7)"
    run(url, lambda connection: connection.execute(text(part)))
    with pytest.raises(ValueError, match="paid in part"):
        command.downgrade(config, "0016")
