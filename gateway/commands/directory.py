"""bulkhead tenant, admin: who is served, and who looks after it."""

import json
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.clerk import Clerk
from gateway.commands.session import CommandError, Session, in_transaction, open_session
from gateway.records.tenants import tenant_records
from gateway.secrets import metrics_token
from tenancy.access.directory import Tenant, get_tenant_by_name, list_tenants
from tenancy.accounts.posting import CURRENCY
from tenancy.closing import Closed
from tenancy.money import format_nano
from tenancy.quotas.limits import LIMIT_NAMES, LimitName

NANO_PER_USD = 10**9
WIDTH_MAX = 500  # tables are never cut: what does not fit a terminal is wrapped there

tenant_app = typer.Typer(no_args_is_help=True, help="Tenants.")
admin_app = typer.Typer(no_args_is_help=True, help="Operators of the admin page.")

TenantName = Annotated[str, typer.Option("--tenant", help="the tenant's name")]
TenantArgument = Annotated[str, typer.Argument(help="the tenant's name")]
Reason = Annotated[str, typer.Option("--reason", help="kept in the log")]
AsJson = Annotated[bool, typer.Option("--json", help="for programs")]
Listed = list[tuple[tuple[str, ...], dict[str, Any]]]  # each as a row for people and as exact values


def clerk(session: Session, conn: AsyncConnection) -> Clerk:
    return Clerk(conn, session.world.entropy, session.world.now_ns())


async def find_tenant(conn: AsyncConnection, name: str) -> Tenant:
    tenant = await get_tenant_by_name(conn, name)
    if tenant is None:
        raise CommandError(f"there is no tenant {name!r}; see: bulkhead tenant list")
    return tenant


def exact(text: str, scale: int, option: str) -> int:
    """A decimal number times `scale`, which must come out whole: prices and amounts are never rounded here."""
    try:
        value = Decimal(text) * scale
    except InvalidOperation as error:
        raise CommandError(f"{option} {text!r} is not a decimal number") from error
    if not value.is_finite() or value < 0 or value != value.to_integral_value():
        raise CommandError(f"{option} {text!r} must be 0 or more, with no more decimals than are kept exactly")
    return int(value)


@tenant_app.command("create")
def tenant_create(
    name: Annotated[str, typer.Option(help="unique name")],
    organisation: Annotated[str, typer.Option(help="organisation it belongs to; default: its own name")] = "",
    requests_per_minute: Annotated[int | None, typer.Option(min=0)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=0)] = None,
    concurrency: Annotated[int | None, typer.Option(min=0, help="requests at the same time")] = None,
    currency: Annotated[str, typer.Option(help="of its accounts, prices and invoices, for good: ISO 4217")] = CURRENCY,
) -> None:
    """Create a tenant with one project, its ledger accounts and its limits."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        one = clerk(session, conn)
        tenant_id, _ = await one.create_tenant(name, organisation=organisation or name, currency=currency)
        await one.set_limits("tenant", tenant_id, requests_per_minute, tokens_per_minute, concurrency)
        return tenant_id

    typer.echo(f"tenant {name} is {in_transaction(session, work)}")


@tenant_app.command("list")
def tenant_list(as_json: AsJson = False) -> None:
    """List tenants with credit, held money, limits and weight."""
    session = open_session()

    async def work(conn: AsyncConnection) -> Listed:
        return [(tenant_row(one), one) for one in await tenant_records(conn, await list_tenants(conn))]

    columns = (
        "tenant",
        "id",
        "status",
        "credit",
        "held",
        "billed",
        "req/min",
        "tok/min",
        "at once",
        "tok/day",
        "weight",
    )
    print_list(columns, in_transaction(session, work), as_json, numbers_from=3)


def tenant_row(one: dict[str, Any]) -> tuple[str, ...]:
    amounts = (one[f"{name}_nano_usd"] for name in ("credit", "held", "captured"))
    return (
        one["name"],
        one["tenant_id"],
        one["status"],
        *(format_nano(amount, one["currency"]) for amount in amounts),
        *(limit_text(one["limits"], name) for name in LIMIT_NAMES),
        str(one["weight"]),
    )


def limit_text(limits: dict[str, Any], name: LimitName) -> str:
    value = limits[name]
    return "-" if value is None else f"{value:,}" + (" (shadow)" if name in limits["shadow"] else "")


@tenant_app.command("suspend")
def tenant_suspend(name: TenantArgument, reason: Reason = "") -> None:
    """Stop serving a tenant: its keys are refused at once, what runs for it ends within a second."""
    set_status(name, "suspended", reason)
    typer.echo(f"tenant {name} is suspended")


@tenant_app.command("resume")
def tenant_resume(name: TenantArgument, reason: Reason = "") -> None:
    """Serve a suspended tenant again, with the same keys."""
    set_status(name, "active", reason)
    typer.echo(f"tenant {name} is active")


def set_status(name: str, status: Literal["active", "suspended"], reason: str) -> None:
    session = open_session()

    async def work(conn: AsyncConnection) -> None:
        await clerk(session, conn).set_tenant_status((await find_tenant(conn, name)).tenant_id, status, reason)

    in_transaction(session, work)


@tenant_app.command("delete")
def tenant_delete(name: TenantArgument, reason: Reason = "") -> None:
    """Delete a tenant for good: revoke its keys. Refused while requests of it hold money."""
    session = open_session()

    async def work(conn: AsyncConnection) -> Closed:
        return await clerk(session, conn).delete_tenant((await find_tenant(conn, name)).tenant_id, reason)

    closed = in_transaction(session, work)
    left = format_nano(closed.credit_nano_usd, closed.currency)
    typer.echo(f"tenant {name} is deleted; {closed.num_keys_revoked} keys revoked, unspent credit {left}")


@admin_app.command("create")
def admin_create(name: Annotated[str, typer.Option(help="log-in name")]) -> None:
    """Create an operator for the admin page and show a generated password once."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        return await clerk(session, conn).create_operator(name)

    typer.echo(in_transaction(session, work))
    typer.echo("This is shown once; only its hash is kept.", err=True)


@admin_app.command("disable")
def admin_disable(name: Annotated[str, typer.Argument(help="the operator's log-in name")], reason: Reason = "") -> None:
    """Disable an operator for good: sessions and tokens end at once."""
    session = open_session()

    async def work(conn: AsyncConnection) -> bool:
        return await clerk(session, conn).disable_operator(name, reason)

    was = "is" if in_transaction(session, work) else "was already"
    typer.echo(f"operator {name} {was} disabled")


@admin_app.command("metrics-token")
def admin_metrics_token() -> None:
    """Print the bearer token that a scraper of /metrics presents."""
    typer.echo(metrics_token(open_session().secrets))


def print_list(
    columns: tuple[str, ...],
    listed: Listed,
    as_json: bool,
    numbers_from: int | None = None,
) -> None:
    """A table for people, or one JSON array."""
    if as_json:
        typer.echo(json.dumps([values for _, values in listed]))
    else:
        print_table(columns, [row for row, _ in listed], numbers_from)


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers_from: int | None = None) -> None:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = numbers_from is not None and index >= numbers_from
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=WIDTH_MAX).print(table)
