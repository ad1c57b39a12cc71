"""bulkhead admin token: create, list, revoke."""

from dataclasses import asdict
from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.commands.directory import AsJson, Listed, Reason, print_list
from gateway.commands.keys import Expires, instant_ns, iso, show_once
from gateway.commands.session import Session, in_snapshot, in_transaction, open_session
from gateway.token_clerk import TokenClerk
from tenancy.access.operator_tokens import list_tokens

token_app = typer.Typer(no_args_is_help=True, help="Tokens with which an operator's programs use the operators' API.")


@token_app.command("create")
def token_create(
    operator: Annotated[str, typer.Option(help="whose it is: a name from bulkhead admin create")],
    name: Annotated[str, typer.Option(help="what it is for")] = "token",
    expires: Expires = "",
    read_only: Annotated[bool, typer.Option("--read-only", help="it changes nothing")] = False,
) -> None:
    """Create a token and show its secret once."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        minted = await token_clerk(session, conn).create(
            operator,
            name,
            session.secrets.key_pepper,
            read_only=read_only,
            expires_ns=instant_ns(session, expires),
        )
        return minted.secret_text

    show_once(in_transaction(session, work))


@token_app.command("list")
def token_list(as_json: AsJson = False) -> None:
    """List operators' tokens, never their secrets."""
    session = open_session()
    now_ns = session.world.now_ns()

    async def work(conn: AsyncConnection) -> Listed:
        return [
            (
                (
                    one.token_id,
                    f"bko-{one.public_id}-...",
                    one.operator,
                    one.name,
                    "reads" if one.read_only else "reads and writes",
                    one.state(now_ns),
                    iso(one.expires_ns),
                    iso(one.last_used_ns),
                ),
                asdict(one) | {"state": one.state(now_ns)},
            )
            for one in await list_tokens(conn)
        ]

    columns = ("id", "token", "operator", "name", "may", "state", "expires", "last used")
    print_list(columns, in_snapshot(session, work), as_json)


@token_app.command("revoke")
def token_revoke(
    token_id: Annotated[str, typer.Argument(help="the token's id, from: bulkhead admin token list")],
    reason: Reason = "",
) -> None:
    """Revoke a token; the next request with it is refused."""
    session = open_session()

    async def work(conn: AsyncConnection) -> bool:
        return await token_clerk(session, conn).revoke(token_id, reason)

    typer.echo("revoked" if in_transaction(session, work) else "it was revoked before")


def token_clerk(session: Session, conn: AsyncConnection) -> TokenClerk:
    return TokenClerk(conn, session.world.entropy, session.world.now_ns())
