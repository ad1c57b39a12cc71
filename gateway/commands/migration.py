"""`bulkhead migrate`: the schema, and who may do what with it."""

import asyncio

import typer
from sqlalchemy import make_url

from gateway.database import Database
from gateway.host.folders import open_folders
from gateway.host.migrate import migrate as run
from gateway.rights.standing import Standing, standing
from gateway.settings import Settings


def migrate(settings: Settings, serving_role: str) -> None:
    """As the owner, where the settings name one: then whom the server connects as is a serving role."""
    open_folders(settings.data_dir, settings.secrets_dir)
    role = serving_role or _server_of(settings)
    changed = run(settings.migration_database_url or settings.effective_database_url, serving_role=role)
    typer.echo("database upgraded" if changed else "database is up to date")
    if role:
        typer.echo(f"{role} has the rights of a server and no others; see: bulkhead migrate --check")


def check(settings: Settings) -> int:
    """What the server would find: 0 where append-only is held by rights, else 1."""

    async def look() -> Standing:
        database = Database(settings.effective_database_url)
        try:
            async with database.read() as conn:
                return await standing(conn)
        finally:
            await database.dispose()

    found = asyncio.run(look())
    typer.echo(found.sentence())
    for what in found.excess:
        typer.echo(f"  too much: {found.role} {what}")
    for what in found.missing:
        typer.echo(f"  too little: {found.role} lacks {what}")
    for name in found.unguarded:
        typer.echo(f"  unguarded: {name} lacks its triggers")
    if found.role:
        held = "row-level security holds" if found.row_security else "row-level security does not hold"
        typer.echo(held + "".join(f"\n  {found.role} {why}" for why in found.unwalled))
    return 0 if found.append_only == "rights" and found.row_security and not found.missing else 1


def _server_of(settings: Settings) -> str:
    if not settings.migration_database_url or not settings.database_url:
        return ""
    name = make_url(settings.database_url).username or ""
    return "" if name == make_url(settings.migration_database_url).username else name
