"""Append-only by rights: the role that a server connects as cannot change what is written, and what somebody grants it
beyond its rights is found."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Column, Integer, MetaData, Table, insert, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from structlog.testing import capture_logs

from audit.transparency import tables as audit_tables
from gateway.database import Database
from gateway.host.migrate import MigrationError, migrate
from gateway.rights.declared import Rights, append_only_tables, declared, rights_of
from gateway.rights.grants import renew_grants
from gateway.rights.standing import Standing, StandingWatch, standing
from tenancy import tables
from tests.migrations.test_migrations import scripts
from tests.servers import PostgresServer, create_served_tables, owner_of, serving_role_of

# Those whose rows nobody may change: tenancy's, with triggers; the log's, by rights alone.
UNCHANGED = sorted({*append_only_tables(), "log_leaf", "log_opening", "outbox", "checkpoint"})
PLACE_HOLD = "place_hold_v1(" + ", ".join([*["text"] * 10, *["bigint"] * 6]) + ")"
DELETED = ("log_opening", "outbox")  # erasure, and what was moved into the log


@pytest.fixture(scope="module")
def served(postgres_server: PostgresServer) -> str:
    """Migrated as its owner, for a serving role. Tests leave it as it is."""
    url = postgres_server.new_database()
    migrate(url, serving_role=serving_role_of(url))
    return url.replace("@", "_serves@", 1)


def run(url: str, work: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        database = Database(url)
        try:
            async with database.transaction() as conn:
                return await work(conn)
        finally:
            await database.dispose()

    return asyncio.run(go())


def execute(url: str, *statements: str) -> None:
    async def work(conn: AsyncConnection) -> None:
        for statement in statements:
            await conn.exec_driver_sql(statement)

    run(url, work)


def seen(url: str) -> Standing:
    found: Standing = run(url, standing)
    return found


def test_a_server_owns_nothing_and_may_do_what_is_declared(served: str) -> None:
    found = seen(served)
    assert found == Standing(serving_role_of(served))
    assert (found.append_only, found.row_security) == ("rights", True)


def test_every_table_has_the_rights_that_are_declared_and_no_others(served: str) -> None:
    """From the grants themselves, by another way than the check asks: the information schema."""

    async def granted(conn: AsyncConnection) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        role = {"role": serving_role_of(served)}
        on_tables = await conn.execute(
            text("SELECT table_name, privilege_type FROM information_schema.role_table_grants WHERE grantee = :role"),
            role,
        )
        on_columns = await conn.execute(
            text(
                "SELECT table_name, column_name FROM information_schema.role_column_grants"
                " WHERE grantee = :role AND privilege_type = 'UPDATE'"
            ),
            role,
        )
        return {(row[0], row[1]) for row in on_tables}, {(row[0], row[1]) for row in on_columns}

    on_tables, on_columns = run(served, granted)
    assert on_tables == {(name, one) for name, rights in declared().items() for one in rights.on_table}
    every: list[Table] = [*tables.metadata.sorted_tables, *audit_tables.metadata.sorted_tables]
    assert {name for name, _ in on_tables} == {table.name for table in every} | {"alembic_version"}
    for table in every:
        changed = {column for name, column in on_columns if name == table.name}
        rights = declared()[table.name]
        assert changed == (set(table.c.keys()) if "UPDATE" in rights.on_table else rights.changed), table.name
        assert not (table.name in UNCHANGED and changed)
    deleted = {name for name, privilege in on_tables if privilege == "DELETE"}
    assert deleted.isdisjoint(set(UNCHANGED) - set(DELETED))


def test_a_table_that_is_added_later_has_rights_by_what_it_is() -> None:
    def new(**info: Any) -> Table:
        return Table("new", MetaData(), Column("id", Integer, primary_key=True), Column("n", Integer), info=info)

    added = {"SELECT", "INSERT"}
    kept = new()
    tables.make_append_only(kept)
    assert rights_of(kept) == Rights(frozenset(added))
    assert rights_of(new()) == Rights(frozenset({*added, "UPDATE"}))
    assert rights_of(new(changed=("n",), deleted=True)) == Rights(frozenset({*added, "DELETE"}), frozenset({"n"}))
    for wrong in (
        {"append_only": True, "changed": ("n",)},
        {"append_only": True, "deleted": True},
        {"changed": ("m",)},
    ):
        with pytest.raises(AssertionError):
            rights_of(new(**wrong))


def test_a_server_at_work_never_lacks_a_right_while_its_grants_are_renewed(postgres_server: PostgresServer) -> None:
    url = postgres_server.new_served_database()

    async def scenario() -> int:
        server, owner = Database(url), Database(owner_of(url))
        renewing = True

        async def work(number: int) -> int:
            done = 0
            while renewing:
                async with server.transaction() as conn:
                    values = {"id": f"org_{number}_{done}", "name": f"{number} {done}", "created_ns": 1}
                    await conn.execute(insert(tables.organisation).values(values))
                    await conn.execute(update(tables.account).values(balance_nano_usd=0))
                    await conn.exec_driver_sql("SELECT nextval('outbox_id_seq')")
                done += 1
            return done

        workers = [asyncio.create_task(work(number)) for number in range(3)]
        for _ in range(10):
            async with owner.transaction() as conn:
                await conn.run_sync(renew_grants)
        renewing = False
        done = await asyncio.gather(*workers)
        await server.dispose()
        await owner.dispose()
        return sum(done)

    assert asyncio.run(scenario()) > 10


def attempts(name: str, column: str) -> list[str]:
    return [
        f"UPDATE {name} SET {column} = {column}",
        *([] if name in DELETED else [f"DELETE FROM {name}"]),
        f"TRUNCATE {name} CASCADE",
        f"SELECT 1 FROM {name} FOR UPDATE",
        *([f"DROP TRIGGER {name}_no_change ON {name}"] if name in append_only_tables() else []),
        f"ALTER TABLE {name} DISABLE TRIGGER USER",
        f"ALTER TABLE {name} DISABLE ROW LEVEL SECURITY",
        f"ALTER TABLE {name} OWNER TO current_user",
        f"ALTER TABLE {name} ADD COLUMN planted int",
        f"CREATE TRIGGER planted BEFORE INSERT ON {name} EXECUTE FUNCTION tenancy_refuse_change()",
        f"CREATE POLICY planted ON {name} USING (true)",
        f"CREATE RULE planted AS ON INSERT TO {name} DO INSTEAD NOTHING",
        f"DROP TABLE {name} CASCADE",
    ]


@pytest.mark.parametrize("name", UNCHANGED)
def test_nothing_that_is_written_can_be_changed_nor_its_guards_taken_away(served: str, name: str) -> None:
    table = (tables.metadata.tables.get(name), audit_tables.metadata.tables.get(name))
    column = next(one for one in table if one is not None).primary_key.columns.keys()[0]

    async def refused(conn: AsyncConnection) -> None:
        for attempt in attempts(name, column):
            with pytest.raises(DBAPIError, match=r"permission denied|must be owner|must be able to SET ROLE") as caught:
                async with conn.begin_nested():
                    await conn.exec_driver_sql(attempt)
            assert getattr(caught.value.orig, "sqlstate", "") == "42501", attempt  # insufficient_privilege

    run(served, refused)


def test_neither_functions_schema_nor_session_are_a_way_around(served: str) -> None:
    schema = serving_role_of(served).removesuffix("_serves")
    refuse = "RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$"
    around = [
        f"CREATE OR REPLACE FUNCTION {schema}.tenancy_refuse_change() {refuse}",
        "DROP FUNCTION tenancy_refuse_change() CASCADE",
        f"CREATE TABLE {schema}.planted (n int)",
        f"ALTER SCHEMA {schema} OWNER TO current_user",
        f"DROP SCHEMA {schema} CASCADE",
        "SET session_replication_role = replica",
        f"SET ROLE {schema}",
        "UPDATE alembic_version SET version_num = '0001'",
        "SELECT setval('outbox_id_seq', 1)",
        "UPDATE hold SET amount_nano_usd = 0",
        "UPDATE account SET currency = 'EUR'",
        "UPDATE api_key SET secret_hmac = ''",
        "DELETE FROM hold",
    ]

    async def refused(conn: AsyncConnection) -> None:
        for attempt in around:
            with pytest.raises(DBAPIError) as caught:
                async with conn.begin_nested():
                    await conn.exec_driver_sql(attempt)
            assert getattr(caught.value.orig, "sqlstate", "") == "42501", attempt

    run(served, refused)
    execute(served, f"GRANT UPDATE ON ledger_entry TO {schema}_serves")  # a warning that nothing was granted
    assert seen(served).append_only == "rights"


PLANTS = {
    "GRANT UPDATE ON ledger_entry TO {serving}": "may UPDATE ledger_entry",
    "GRANT UPDATE (amount_nano_usd) ON ledger_entry TO {serving}": "may UPDATE ledger_entry.amount_nano_usd",
    "GRANT DELETE ON usage_record TO PUBLIC": "may DELETE usage_record",
    "GRANT TRUNCATE ON price TO {serving}": "may TRUNCATE price",
    "GRANT TRIGGER ON invoice_document TO {serving}": "may TRIGGER invoice_document",
    "GRANT REFERENCES (id) ON price TO {serving}": "may REFERENCES price.id",
    "GRANT UPDATE ON log_leaf TO {serving}": "may UPDATE log_leaf",
    "GRANT UPDATE (amount_nano_usd) ON hold TO {serving}": "may UPDATE hold.amount_nano_usd",
    "GRANT UPDATE ON alembic_version TO {serving}": "may UPDATE alembic_version",
    "GRANT CREATE ON SCHEMA {owner} TO {serving}": "may create in the schema {owner}",
    "GRANT UPDATE ON SEQUENCE outbox_id_seq TO {serving}": "may set outbox_id_seq",
    "ALTER FUNCTION tenancy_refuse_change() OWNER TO {serving}": "owns the functions",
    "ALTER TABLE ledger_entry OWNER TO {serving}": "owns the tables",
    "ALTER SCHEMA {owner} OWNER TO {serving}": "owns the schema",
    "ALTER FUNCTION {place} SECURITY DEFINER": "runs place_hold_v1 with its owner's rights",
    "GRANT {owner} TO {serving}": "owns the tables",
    "GRANT {owner} TO {serving} WITH INHERIT FALSE": "owns the tables",
    "GRANT pg_write_all_data TO {serving}": "may UPDATE ledger_entry",
    "GRANT pg_execute_server_program TO {serving}": "has the rights of pg_execute_server_program",
    "ALTER ROLE {serving} SUPERUSER": "is a superuser",
    "ALTER ROLE {serving} BYPASSRLS": "has BYPASSRLS",
    "ALTER ROLE {serving} CREATEROLE": "has CREATEROLE",
    "ALTER ROLE {serving} REPLICATION": "has REPLICATION",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_each_right_too_many_is_found(postgres_server: PostgresServer, served: str, plant: str) -> None:
    serving = serving_role_of(served)
    owner = serving.removesuffix("_serves")

    async def planted(conn: AsyncConnection) -> Standing:
        """As a superuser in a transaction that is taken back; in it, the server looks."""
        await conn.exec_driver_sql(f"SET LOCAL search_path = {owner}")
        await conn.exec_driver_sql(plant.format(serving=serving, owner=owner, place=PLACE_HOLD))
        await conn.exec_driver_sql(f"SET LOCAL SESSION AUTHORIZATION {serving}")
        found = await standing(conn)
        await conn.rollback()
        return found

    found = run(postgres_server.url_of("postgres"), planted)
    assert PLANTS[plant].format(owner=owner) in found.excess
    assert found.append_only == "triggers"
    assert "docs/operations.md" in found.sentence()
    assert found.row_security is not ("superuser" in found.sentence() or "BYPASSRLS" in found.sentence())


def test_the_next_migration_takes_back_what_was_granted(postgres_server: PostgresServer) -> None:
    url = postgres_server.new_database()
    serving = serving_role_of(url)
    migrate(url, serving_role=serving)
    served = url.replace("@", "_serves@", 1)
    execute(url, f"GRANT ALL ON ledger_entry, hold TO {serving}", f"GRANT UPDATE (id) ON price TO {serving}, PUBLIC")
    execute(url, f"GRANT CREATE ON SCHEMA {serving.removesuffix('_serves')} TO {serving}")
    assert seen(served).append_only == "triggers"
    migrate(url, serving_role=serving)
    assert seen(served) == Standing(serving)


def test_a_table_that_is_new_has_its_grants_with_the_migration_that_makes_it(postgres_server: PostgresServer) -> None:
    """Nobody has to name the role again: whoever served keeps serving. Here the last migration is done once more."""
    url = postgres_server.new_database()
    serving = serving_role_of(url)
    migrate(url, serving_role=serving)
    served = url.replace("@", "_serves@", 1)
    command.downgrade(scripts(url), "0016")
    assert "INSERT on invoice_payment" in seen(served).missing
    assert migrate(url) is True
    assert seen(served) == Standing(serving)


def test_a_role_of_another_name_and_a_second_one(postgres_server: PostgresServer) -> None:
    url = postgres_server.new_served_database()
    owner = serving_role_of(url).removesuffix("_serves")
    other = f"{owner}-Other Role"
    make = (f'CREATE ROLE "{other}" LOGIN', f'ALTER ROLE "{other}" SET search_path = {owner}')
    asyncio.run(postgres_server.execute(*make))

    async def renew(conn: AsyncConnection) -> list[str]:
        return await conn.run_sync(renew_grants, other)

    assert run(owner_of(url), renew) == sorted([serving_role_of(url), other])
    there = url.replace(f"{owner}_serves@", f"{owner}-Other%20Role@", 1)
    assert seen(there) == Standing(other)
    assert seen(url).append_only == "rights"


def test_triggers_that_are_gone_and_a_wall_that_is_down_are_found(postgres_server: PostgresServer) -> None:
    url = postgres_server.new_database()
    asyncio.run(create_served_tables(url))
    assert seen(url).append_only == "triggers"  # the owner, as every server until now
    assert seen(url).row_security
    execute(url, "DROP TRIGGER ledger_entry_no_truncate ON ledger_entry", "ALTER TABLE price DISABLE TRIGGER USER")
    found = seen(url)
    assert (found.append_only, found.unguarded) == ("nothing", ("ledger_entry", "price"))
    assert "ledger_entry, price lack their triggers" in found.sentence()
    execute(url, "ALTER TABLE hold DISABLE ROW LEVEL SECURITY", "ALTER TABLE project NO FORCE ROW LEVEL SECURITY")
    found = seen(url.replace("@", "_serves@", 1))
    assert found.append_only == "rights"
    assert not found.row_security
    assert len(found.unwalled) == 2


def test_what_a_role_lacks_is_named(postgres_server: PostgresServer) -> None:
    url = postgres_server.new_served_database()
    serving = serving_role_of(url)
    execute(
        owner_of(url),
        f"REVOKE INSERT ON usage_record FROM {serving}",
        f"REVOKE UPDATE (state) ON hold FROM {serving}",
        f"REVOKE USAGE ON SEQUENCE outbox_id_seq FROM {serving}",
        f"REVOKE EXECUTE ON FUNCTION {PLACE_HOLD} FROM {serving}",
    )
    expected = {"INSERT on usage_record", "UPDATE on hold.state", "USAGE on outbox_id_seq", "EXECUTE on place_hold_v1"}
    assert set(seen(url).missing) == expected


def test_a_server_that_may_not_migrate_says_who_has_to(postgres_server: PostgresServer) -> None:
    url = postgres_server.new_database()
    serving, served = serving_role_of(url), url.replace("@", "_serves@", 1)
    owner = serving.removesuffix("_serves")
    by_hand = f"bulkhead migrate --serving-role {serving}"
    with pytest.raises(MigrationError, match="finds no tables and may not make them") as caught:
        migrate(served)
    assert by_hand in str(caught.value)
    migrate(url)
    with pytest.raises(MigrationError, match=by_hand):
        migrate(served)  # no USAGE on the schema yet
    execute(url, f"GRANT USAGE ON SCHEMA {owner} TO {serving}")
    with pytest.raises(MigrationError, match="has no rights to the tables") as caught:
        migrate(served)
    assert f"{by_hand}` as {owner}" in str(caught.value)
    migrate(url, serving_role=serving)
    assert migrate(served) is False
    execute(url, "UPDATE alembic_version SET version_num = '0016'")
    with pytest.raises(MigrationError, match="is at revision 0016, this version needs") as caught:
        migrate(served)
    assert f"{by_hand}` as {owner}" in str(caught.value)
    execute(url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(MigrationError, match="does not know"):
        migrate(served)


@pytest.mark.parametrize(
    ("role", "reason"),
    [("nobody_of_that_name", "there is no role"), ("postgres", "is a superuser"), ("{owner}", "who owns the tables")],
)
def test_roles_that_cannot_serve(postgres_server: PostgresServer, role: str, reason: str) -> None:
    url = postgres_server.new_database()
    owner = serving_role_of(url).removesuffix("_serves")
    with pytest.raises(MigrationError, match=reason):
        migrate(url, serving_role=role.format(owner=owner))

    async def tables_there(conn: AsyncConnection) -> Any:
        return await conn.scalar(text("SELECT to_regclass('hold')"))

    assert run(url, tables_there) is None  # whole or not at all


def test_sqlite_has_triggers_alone_and_says_so(tmp_path: Any) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'x.db'}"
    with pytest.raises(MigrationError, match="SQLite has no roles"):
        migrate(url, serving_role="x")
    migrate(url)
    found = seen(url)
    assert (found.append_only, found.row_security, found.role) == ("triggers", False, "")
    execute(url, "DROP TRIGGER ledger_entry_no_insert")
    found = seen(url)
    assert (found.append_only, found.unguarded) == ("nothing", ("ledger_entry",))


def test_what_changes_while_a_server_runs_is_told_once(postgres_server: PostgresServer) -> None:
    url = postgres_server.new_served_database()

    async def scenario() -> None:
        database = Database(url)
        owner = Database(owner_of(url))
        watch = StandingWatch(database)
        with capture_logs() as told:
            await watch.look()
            await watch.look()
            async with owner.transaction() as conn:
                await conn.exec_driver_sql(f"GRANT UPDATE ON ledger_entry TO {serving_role_of(url)}")
            await watch.look()
            await watch.look()
        await database.dispose()
        await owner.dispose()
        assert [(one["log_level"], one["held_by"]) for one in told] == [("info", "rights"), ("warning", "triggers")]
        assert "may UPDATE ledger_entry" in told[1]["why"]

    asyncio.run(scenario())
