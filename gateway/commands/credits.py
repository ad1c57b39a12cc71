"""bulkhead credit grant, limit, list: prepaid credit, of a kind and with an end or without, and credit lines."""

from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.commands.corrections import credit_adjust, credit_refund
from gateway.commands.directory import (
    NANO_PER_USD,
    AsJson,
    Listed,
    Reason,
    TenantName,
    clerk,
    exact,
    find_tenant,
    print_list,
)
from gateway.commands.keys import Expires, instant_ns, iso
from gateway.commands.session import in_transaction, open_session
from gateway.records.money import credit_records
from tenancy.accounts.credit_line import CreditLine, get_line
from tenancy.accounts.credits import CreditKind
from tenancy.accounts.ledger import balance
from tenancy.accounts.posting import currency_of
from tenancy.money import format_nano

credit_app = typer.Typer(no_args_is_help=True, help="Prepaid credit.")


Usd = Annotated[str, typer.Option(help="amount in the account's currency, a decimal number")]


@credit_app.command("grant")
def credit_grant(
    tenant: TenantName,
    usd: Usd,
    memo: Annotated[str, typer.Option(help="kept with the transfer")] = "credit",
    kind: Annotated[CreditKind, typer.Option(help="promotional credit is used before paid credit")] = "paid",
    expires: Expires = "",
    transfer_id: Annotated[str, typer.Option(help="makes a repeat harmless")] = "",
) -> None:
    """Add prepaid credit."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        found = await find_tenant(conn, tenant)
        amount, expires_ns = exact(usd, NANO_PER_USD, "--usd"), instant_ns(session, expires)
        one = clerk(session, conn)
        await one.grant_credit(
            found.tenant_id, amount, transfer_id=transfer_id, memo=memo, kind=kind, expires_ns=expires_ns
        )
        credit_nano_usd = (await balance(conn, found.tenant_id)).credit_nano_usd
        return format_nano(credit_nano_usd, await currency_of(conn, found.tenant_id))

    typer.echo(f"{tenant} now has {in_transaction(session, work)}")


@credit_app.command("limit")
def credit_limit(tenant: TenantName, usd: Usd, reason: Reason = "") -> None:
    """Make a tenant post-paid up to a limit, change the limit, or with 0 make it pre-paid again."""
    session = open_session()
    limit_nano_usd = exact(usd, NANO_PER_USD, "--usd")

    async def work(conn: AsyncConnection) -> tuple[CreditLine | None, str]:
        found = await find_tenant(conn, tenant)
        await clerk(session, conn).set_credit_limit(found.tenant_id, limit_nano_usd, reason)
        return await get_line(conn, found.tenant_id), await currency_of(conn, found.tenant_id)

    line, currency = in_transaction(session, work)
    if line is None or not line.limit_nano_usd:
        typer.echo(f"{tenant} is pre-paid")
        return
    names = ("limit", "drawn", "receivable")
    limit, drawn, due = (format_nano(getattr(line, f"{name}_nano_usd"), currency) for name in names)
    typer.echo(f"{tenant} is post-paid up to {limit}; used and not paid {drawn}, of that billed with tax {due}")


@credit_app.command("list")
def credit_list(tenant: TenantName, as_json: AsJson = False) -> None:
    """List what a tenant's credit is made of, in the order in which it is used."""
    session = open_session()

    async def work(conn: AsyncConnection) -> Listed:
        found = await find_tenant(conn, tenant)
        return [
            (
                (
                    one["credit_id"],
                    one["kind"],
                    iso(one["expires_ns"]),
                    format_nano(one["amount_nano_usd"], one["currency"]),
                    format_nano(one["left_nano_usd"], one["currency"]),
                ),
                one,
            )
            for one in await credit_records(conn, found.tenant_id, session.world.now_ns())
        ]

    print_list(
        ("transfer", "kind", "expires", "granted", "left"), in_transaction(session, work), as_json, numbers_from=3
    )


credit_app.command("refund")(credit_refund)
credit_app.command("adjust")(credit_adjust)
