"""bulkhead key: create, list, rotate, revoke."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.commands.directory import AsJson, Listed, Reason, TenantName, clerk, find_tenant, print_list
from gateway.commands.session import CommandError, Session, in_transaction, open_session
from gateway.records.tenants import key_record
from tenancy.access.directory import list_projects, owner_of
from tenancy.access.key_rules import TIERS, read_rules
from tenancy.access.keys import ApiKey, list_keys

NS_PER_S = 10**9

key_app = typer.Typer(no_args_is_help=True, help="API keys.")
KeyId = Annotated[str, typer.Argument(help="the key's id, from: bulkhead key list")]
Expires = Annotated[str, typer.Option("--expires", help="ISO 8601 with an offset, such as 2027-01-31T00:00Z")]


def instant_ns(session: Session, text: str) -> int | None:
    """A future instant; None for no text."""
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise CommandError(f"--expires {text!r} is not an ISO 8601 date and time") from error
    if at.tzinfo is None:
        raise CommandError(f"--expires {text!r} has no offset from UTC: add Z")
    at_ns = int(at.astimezone(UTC).timestamp()) * NS_PER_S
    if at_ns <= session.world.now_ns():
        raise CommandError(f"--expires {text!r} is not in the future")
    return at_ns


def iso(at_ns: int | None) -> str:
    return "-" if at_ns is None else datetime.fromtimestamp(at_ns // NS_PER_S, UTC).strftime("%Y-%m-%dT%H:%MZ")


@key_app.command("create")
def key_create(
    tenant: TenantName,
    name: Annotated[str, typer.Option(help="what it is for")] = "key",
    scope: Annotated[list[str] | None, typer.Option(help="inference, usage, audit or admin; repeatable")] = None,
    expires: Expires = "",
    model: Annotated[list[str] | None, typer.Option(help="the only model it may ask for; repeatable")] = None,
    network: Annotated[list[str] | None, typer.Option(help="the only network (CIDR) it works from; repeatable")] = None,
    tier: Annotated[list[str] | None, typer.Option(help="the only service tier it may name; repeatable")] = None,
) -> None:
    """Create an API key and show its secret once."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        found = await find_tenant(conn, tenant)
        project = (await list_projects(conn, found.tenant_id))[0]
        minted = await clerk(session, conn).create_key(
            found.tenant_id,
            project.project_id,
            name,
            session.secrets.key_pepper,
            scopes=frozenset(scope or ["inference"]),
            expires_ns=instant_ns(session, expires),
            rules=read_rules(model or (), network or (), tier or ()),
        )
        return minted.secret_text

    show_once(in_transaction(session, work))


@key_app.command("rotate")
def key_rotate(
    key_id: KeyId,
    overlap: Annotated[int, typer.Option(min=0, help="seconds in which the old key still works")] = 86_400,
    expires: Expires = "",
) -> None:
    """Create a key with the same rules, show its secret once, and end the old key after the overlap."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        minted = await clerk(session, conn).rotate_key(
            key_id,
            session.secrets.key_pepper,
            overlap_ns=overlap * NS_PER_S,
            expires_ns=instant_ns(session, expires),
        )
        return minted.secret_text

    show_once(in_transaction(session, work))


@key_app.command("list")
def key_list(tenant: TenantName, as_json: AsJson = False) -> None:
    """List the keys of a tenant, never their secrets."""
    session = open_session()

    async def work(conn: AsyncConnection) -> Listed:
        found, now_ns = await list_keys(conn, (await find_tenant(conn, tenant)).tenant_id), session.world.now_ns()
        return [(key_row(key, now_ns), key_record(key, now_ns)) for key in found]

    columns = ("id", "key", "name", "scopes", "state", "expires", "last used", "models", "networks", "tiers")
    print_list(columns, in_transaction(session, work), as_json)


def key_row(key: ApiKey, now_ns: int) -> tuple[str, ...]:
    return (
        key.key_id,
        f"bk-{key.public_id}-...",
        key.name,
        " ".join(sorted(key.scopes)),
        key.state(now_ns),
        iso(key.expires_ns),
        iso(key.last_used_ns),
        " ".join(sorted(key.rules.models)) or "any",
        " ".join(key.rules.networks) or "any",
        " ".join(tier for tier in TIERS if tier in key.rules.tiers) or "any",
    )


@key_app.command("revoke")
def key_revoke(key_id: KeyId, reason: Reason = "") -> None:
    """Revoke a key; the next request with it is refused."""
    session = open_session()

    async def work(conn: AsyncConnection) -> bool:
        return await clerk(session, conn).revoke_key(await owner_of(conn, "key", key_id), key_id, reason)

    typer.echo("revoked" if in_transaction(session, work) else "it was revoked before")


def show_once(secret_text: str) -> None:
    typer.echo(secret_text)
    typer.echo("This is shown once; only its hash is kept.", err=True)
