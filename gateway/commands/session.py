"""What a command works with: settings, world, folders, secrets, and one transaction."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.database import Database
from gateway.host.folders import Folders, open_folders
from gateway.host.migrate import migrate
from gateway.secrets import Secrets, load_secrets
from gateway.settings import Settings, load_settings
from gateway.world import World, real_world

Result = TypeVar("Result")


class CommandError(Exception):
    """The command cannot be done as asked; the message says why."""


@dataclass(frozen=True, slots=True)
class Session:
    settings: Settings
    world: World
    folders: Folders
    secrets: Secrets


def open_session() -> Session:
    world = real_world()
    settings = load_settings(world.environ)
    folders = open_folders(settings.data_dir, settings.secrets_dir)
    migrate(settings.effective_database_url)
    return Session(settings, world, folders, load_secrets(folders.secrets, world.entropy))


def in_transaction(session: Session, work: Callable[[AsyncConnection], Awaitable[Result]]) -> Result:
    """Run `work` in one transaction of its own and return its result."""

    async def run() -> Result:
        database = Database(session.settings.effective_database_url)
        try:
            async with database.transaction() as conn:
                return await work(conn)
        finally:
            await database.dispose()

    return asyncio.run(run())


def in_snapshot(session: Session, work: Callable[[AsyncConnection], Awaitable[Result]]) -> Result:
    """Run `work` on a snapshot that it only reads: a long look keeps no writer waiting."""

    async def run() -> Result:
        database = Database(session.settings.effective_database_url)
        try:
            async with database.read() as conn:
                return await work(conn)
        finally:
            await database.dispose()

    return asyncio.run(run())
