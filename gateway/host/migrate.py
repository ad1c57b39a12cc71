"""Bring the database to the newest revision, one process at a time."""

import asyncio

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine


class MigrationError(Exception):
    """The database cannot be brought to this version's schema; the message says what to do."""


def migrate(url: str) -> bool:
    """Upgrade `url` to head; True when something changed. Must run outside an event loop (a thread will do)."""
    config = Config()
    config.set_main_option("script_location", "migrations:")
    config.attributes["url"] = url
    head = ScriptDirectory.from_config(config).get_current_head()
    try:
        current = asyncio.run(_current_revision(url))
        if current == head:
            return False
        command.upgrade(config, "head")
    except CommandError as error:
        raise MigrationError(
            f"the database has a revision that this version does not know ({error}):"
            " run the version of Bulkhead that wrote it, or a newer one"
        ) from error
    except Exception as error:
        place = url.rsplit("@", 1)[-1]
        reason = str(error).splitlines()[0]
        raise MigrationError(f"the database {place} cannot be opened or upgraded: {reason}") from error
    return True


async def _current_revision(url: str) -> str | None:
    engine = create_async_engine(url)
    try:
        async with engine.connect() as conn:

            def read(connection: Connection) -> str | None:
                return MigrationContext.configure(connection).get_current_revision()

            return await conn.run_sync(read)
    finally:
        await engine.dispose()
