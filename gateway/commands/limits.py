"""bulkhead limits: the limits of one organisation, tenant, project or key."""

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.commands.directory import clerk, find_tenant
from gateway.commands.session import CommandError, in_transaction, open_session
from tenancy.access.directory import get_organisation_by_name
from tenancy.quotas.limits import WEIGHT_MAX, LimitName

SHADOW_NAMES: Final[Mapping[str, LimitName]] = {
    "requests-per-minute": "requests_per_minute",
    "tokens-per-minute": "tokens_per_minute",
    "tokens-per-day": "tokens_per_day",
    "concurrency": "concurrency_max",
}

limits_app = typer.Typer(no_args_is_help=True, help="Limits per minute and at once.")


@limits_app.callback()
def limits() -> None:
    """Limits per minute and at once."""


@limits_app.command("set")
def limits_set(
    scope: Annotated[Literal["organisation", "tenant", "project", "key"], typer.Option(help="what is limited")],
    of: Annotated[str, typer.Option(help="an organisation's or tenant's name, a project's or key's id")],
    requests_per_minute: Annotated[int | None, typer.Option(min=0)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=0)] = None,
    tokens_per_day: Annotated[int | None, typer.Option(min=0, help="in UTC")] = None,
    concurrency: Annotated[int | None, typer.Option(min=0, help="requests at the same time")] = None,
    shadow: Annotated[list[str] | None, typer.Option(help="a limit that refuses nothing and only tells")] = None,
    weight: Annotated[int, typer.Option(min=1, max=WEIGHT_MAX, help="a tenant's share of the engine")] = 1,
) -> None:
    """Replace the limits of one scope: what is left out is not limited there, and its weight is 1."""
    session = open_session()

    async def work(conn: AsyncConnection) -> None:
        scope_id = of
        if scope == "tenant":
            scope_id = (await find_tenant(conn, of)).tenant_id
        if scope == "organisation":
            found = await get_organisation_by_name(conn, of)
            if found is None:
                raise CommandError(f"there is no organisation {of!r}")
            scope_id = found.organisation_id
        await clerk(session, conn).set_limits(
            scope,
            scope_id,
            requests_per_minute,
            tokens_per_minute,
            concurrency,
            weight,
            tokens_per_day=tokens_per_day,
            shadow=frozenset(map(shadow_name, shadow or ())),
        )

    in_transaction(session, work)
    typer.echo(f"limits of {scope} {of} are set")


def shadow_name(text: str) -> LimitName:
    if text not in SHADOW_NAMES:
        raise CommandError(f"--shadow {text!r} is not a limit: use {', '.join(SHADOW_NAMES)}")
    return SHADOW_NAMES[text]
