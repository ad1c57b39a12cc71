"""Bring the database to the newest revision, one process at a time, and the roles that serve to their rights.

Whoever owns the tables migrates. A server that connects as a role that owns nothing starts where that was done, and
says who has to do it where it was not.
"""

import asyncio
from dataclasses import dataclass
from functools import partial

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine

from gateway.rights.grants import RoleError, renew_grants


class MigrationError(Exception):
    """The database cannot be brought to this version's schema; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Found:
    """`role`, `owner`: "" on SQLite; `owner` is "" too where there are no tables."""

    revision: str | None
    role: str = ""
    owner: str = ""
    may_migrate: bool = True
    may_read: bool = True


def migrate(url: str, *, serving_role: str = "") -> bool:
    """Upgrade `url` to head; True when something changed. Must run outside an event loop (a thread will do).

    On PostgreSQL roles that serve get the rights that new tables ask for; `serving_role` becomes one of them, whether
    or not anything is upgraded. Raises MigrationError.
    """
    config = _config()
    config.attributes["url"] = url
    config.attributes["then"] = partial(renew_grants, role=serving_role)
    scripts = ScriptDirectory.from_config(config)
    head = scripts.get_current_head()
    try:
        found = asyncio.run(_look(url))
        if found.revision == head and not serving_role:
            return False
        if not found.may_migrate:
            if found.revision is not None:
                scripts.get_revision(found.revision)
            raise MigrationError(_who_has_to(found, head))
        command.upgrade(config, "head")
    except (MigrationError, RoleError) as error:
        raise MigrationError(str(error)) from error
    except CommandError as error:
        raise MigrationError(
            f"the database has a revision that this version does not know ({error}):"
            " run the version of Bulkhead that wrote it, or a newer one"
        ) from error
    except Exception as error:
        place = url.rsplit("@", 1)[-1]
        reason = str(error).splitlines()[0]
        raise MigrationError(f"the database {place} cannot be opened or upgraded: {reason}") from error
    return found.revision != head


def head_revision() -> str | None:
    """Of this version's schema."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "migrations:")
    return config


def _who_has_to(found: Found, head: str | None) -> str:
    if not found.may_read:
        state = f"the role {found.role} has no rights to the tables"
    elif found.revision is None:
        state = f"the role {found.role} finds no tables and may not make them"
    else:
        state = (
            f"the database is at revision {found.revision}, this version needs {head},"
            f" and the role {found.role} does not own the tables"
        )
    owner = found.owner or "the role that is to own the tables"
    return (
        f"{state}: run `bulkhead migrate --serving-role {found.role}` as {owner}"
        " (BULKHEAD_MIGRATION_DATABASE_URL), then start again"
    )


async def _look(url: str) -> Found:
    engine = create_async_engine(url)
    try:
        async with engine.connect() as conn:
            return await conn.run_sync(_found)
    finally:
        await engine.dispose()


def _found(connection: Connection) -> Found:
    if connection.dialect.name != "postgresql":
        return Found(MigrationContext.configure(connection).get_current_revision())
    role, owner, may_migrate, may_read = connection.execute(_WHO).one()
    revision = MigrationContext.configure(connection).get_current_revision() if owner and may_read else None
    return Found(revision, role, owner or "", bool(may_migrate), bool(may_read))


# With the owner's rights, or, where there are no tables, with the right to make them.
_WHO = text("""
    SELECT current_user, pg_get_userbyid(c.relowner),
           coalesce(pg_has_role(current_user, c.relowner, 'USAGE'),
                    has_schema_privilege(current_user, current_schema(), 'CREATE'), false),
           coalesce(has_table_privilege(current_user, c.oid, 'SELECT'), true)
    FROM (SELECT to_regclass('alembic_version') AS oid) version LEFT JOIN pg_class c ON c.oid = version.oid
""")
