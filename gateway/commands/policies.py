"""bulkhead tenant policy: what happens to a tenant's requests while the store of quotas is gone."""

from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.commands.directory import clerk, find_tenant
from gateway.commands.session import CommandError, in_transaction, open_session
from tenancy.quotas.failure_policy import (
    SLICE_PERCENT,
    SLICE_PERCENT_MAX,
    FailureMode,
    FailurePolicy,
    FailurePolicyError,
    get_policy,
)


def tenant_policy(
    name: Annotated[str, typer.Argument(help="the tenant's name")],
    mode: Annotated[FailureMode | None, typer.Option(help="left out: show what it is")] = None,
    slice_percent: Annotated[
        int, typer.Option(min=1, max=SLICE_PERCENT_MAX, help="of each limit, for each gateway: lease")
    ] = SLICE_PERCENT,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="cap of each gateway: open")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="cap of each gateway: open")] = 0,
    concurrency: Annotated[int, typer.Option(min=0, help="cap of each gateway: open")] = 0,
) -> None:
    """Set or show what happens to a tenant's requests while Valkey or Redis is gone."""
    session = open_session()
    wanted = None
    if mode is not None:
        try:
            wanted = FailurePolicy(mode, slice_percent, requests_per_minute, tokens_per_minute, concurrency)
        except FailurePolicyError as error:
            raise CommandError(str(error)) from error

    async def work(conn: AsyncConnection) -> FailurePolicy:
        tenant_id = (await find_tenant(conn, name)).tenant_id
        if wanted is None:
            return await get_policy(conn, tenant_id)
        await clerk(session, conn).set_policy(tenant_id, wanted)
        return wanted

    typer.echo(
        f"while quotas cannot be asked, tenant {name} is served by the policy {text(in_transaction(session, work))}"
    )


def text(policy: FailurePolicy) -> str:
    if policy.mode == "lease":
        return f"lease: {policy.slice_percent} % of each limit for each gateway"
    if policy.mode == "open":
        return (
            f"open: {policy.requests_per_minute} requests and {policy.tokens_per_minute} tokens per minute, "
            f"{policy.concurrency_max} at once, for each gateway"
        )
    return "closed: not at all"
