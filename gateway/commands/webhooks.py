"""bulkhead webhook: who is told of alerts, and what became of it."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.commands.directory import AsJson, Listed, clerk, find_tenant, print_list, print_table
from gateway.commands.session import CommandError, in_transaction, open_session
from gateway.records.plain import record
from gateway.webhooks.events import ALERT_KINDS, EVENT_KINDS, num_leaves
from gateway.webhooks.post import PostError, check_url
from gateway.webhooks.signature import endpoint_secret
from tenancy.access.directory import list_tenants
from tenancy.webhooks import deliveries, endpoints, get_endpoint

webhook_app = typer.Typer(no_args_is_help=True, help="Signed messages about budgets, keys and isolation.")

EndpointId = Annotated[str, typer.Argument(help="the endpoint's id")]


@webhook_app.command("add")
def webhook_add(
    url: Annotated[str, typer.Argument(help="https://host/path that takes POST requests")],
    tenant: Annotated[str, typer.Option(help="only what concerns this tenant; left out: everything")] = "",
    kind: Annotated[list[str] | None, typer.Option(help="kind of log entry, repeatable; left out: alerts")] = None,
) -> None:
    """Add an endpoint and show the secret that its receiver verifies with, once."""
    session = open_session()
    kinds = frozenset(kind or ALERT_KINDS)
    if unknown := sorted(kinds - EVENT_KINDS):
        raise CommandError(f"no event is called {', '.join(unknown)}: there are {', '.join(sorted(EVENT_KINDS))}")
    try:
        check_url(url, private_allowed=session.settings.webhook_private)
    except PostError as error:
        raise CommandError(f"{error} (BULKHEAD_WEBHOOK_PRIVATE=1 allows private addresses)") from error

    async def work(conn: AsyncConnection) -> str:
        tenant_id = (await find_tenant(conn, tenant)).tenant_id if tenant else ""
        return await clerk(session, conn).add_webhook(
            url, kinds, tenant_id=tenant_id, next_leaf_index=await num_leaves(conn)
        )

    endpoint_id = in_transaction(session, work)
    typer.echo(f"endpoint {endpoint_id}\nsecret {endpoint_secret(session.secrets, endpoint_id)}")
    typer.echo("the secret is shown only now", err=True)


@webhook_app.command("list")
def webhook_list(as_json: AsJson = False) -> None:
    """List active endpoints."""
    session = open_session()

    async def work(conn: AsyncConnection) -> Listed:
        names = {one.tenant_id: one.name for one in await list_tenants(conn)}
        return [
            (
                (one.endpoint_id, names.get(one.tenant_id, "(all)"), one.url, " ".join(sorted(one.kinds))),
                record(one),
            )
            for one in await endpoints(conn)
        ]

    print_list(("endpoint", "tenant", "url", "kinds"), in_transaction(session, work), as_json, numbers_from=4)


@webhook_app.command("remove")
def webhook_remove(endpoint_id: EndpointId) -> None:
    """End an endpoint; what it has not been sent yet is given up."""
    session = open_session()
    in_transaction(session, lambda conn: clerk(session, conn).remove_webhook(endpoint_id, "removed by an operator"))
    typer.echo(f"endpoint {endpoint_id} is removed")


@webhook_app.command("deliveries")
def webhook_deliveries(
    endpoint: Annotated[str, typer.Option(help="only of this endpoint")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="how many")] = 50,
) -> None:
    """List deliveries, the newest first: state, attempts, and what went wrong last."""
    session = open_session()

    async def work(conn: AsyncConnection) -> list[tuple[str, ...]]:
        if endpoint:
            await get_endpoint(conn, endpoint)
        return [
            (
                one.delivery_id,
                one.endpoint_id,
                one.kind,
                datetime.fromtimestamp(one.created_ns // 10**9, UTC).isoformat(),
                one.state,
                one.last_error or "-",
                str(one.num_attempts),
            )
            for one in await deliveries(conn, endpoint_id=endpoint, limit=limit)
        ]

    columns = ("delivery", "endpoint", "kind", "created", "state", "last error", "attempts")
    print_table(columns, in_transaction(session, work), numbers_from=6)


@webhook_app.command("resend")
def webhook_resend(delivery_id: Annotated[str, typer.Argument(help="the delivery's id")]) -> None:
    """Send a delivery again, whatever became of it; the receiver sees the same event id."""
    session = open_session()
    in_transaction(session, lambda conn: clerk(session, conn).resend_webhook(delivery_id))
    typer.echo(f"delivery {delivery_id} is sent again by the running server")
