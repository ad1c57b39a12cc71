"""bulkhead credit grant, list: prepaid credit, of a kind and with an end or without."""

from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.commands.corrections import credit_adjust, credit_refund
from gateway.commands.directory import NANO_PER_USD, TenantName, clerk, exact, find_tenant, print_table
from gateway.commands.keys import Expires, instant_ns, iso
from gateway.commands.session import in_transaction, open_session
from tenancy.credits import CreditKind, list_credits
from tenancy.ledger import balance
from tenancy.money import format_nano_usd

credit_app = typer.Typer(no_args_is_help=True, help="Prepaid credit.")


@credit_app.command("grant")
def credit_grant(
    tenant: TenantName,
    usd: Annotated[str, typer.Option(help="amount in USD, a decimal number")],
    memo: Annotated[str, typer.Option(help="kept with the transfer")] = "credit",
    kind: Annotated[CreditKind, typer.Option(help="promotional credit is used before paid credit")] = "paid",
    expires: Expires = "",
    transfer_id: Annotated[str, typer.Option(help="makes a repeat harmless")] = "",
) -> None:
    """Add prepaid credit."""
    session = open_session()

    async def work(conn: AsyncConnection) -> int:
        found = await find_tenant(conn, tenant)
        amount, expires_ns = exact(usd, NANO_PER_USD, "--usd"), instant_ns(session, expires)
        one = clerk(session, conn)
        await one.grant_credit(
            found.tenant_id, amount, transfer_id=transfer_id, memo=memo, kind=kind, expires_ns=expires_ns
        )
        return (await balance(conn, found.tenant_id)).credit_nano_usd

    typer.echo(f"{tenant} now has {format_nano_usd(in_transaction(session, work))}")


@credit_app.command("list")
def credit_list(tenant: TenantName) -> None:
    """List what a tenant's credit is made of, in the order in which it is used."""
    session = open_session()

    async def work(conn: AsyncConnection) -> list[tuple[str, ...]]:
        found = await find_tenant(conn, tenant)
        return [
            (
                one.credit_id,
                one.kind,
                iso(one.expires_ns),
                format_nano_usd(one.amount_nano_usd),
                format_nano_usd(one.left_nano_usd),
            )
            for one in await list_credits(conn, found.tenant_id, session.world.now_ns())
        ]

    print_table(("transfer", "kind", "expires", "granted", "left"), in_transaction(session, work), numbers_from=3)


credit_app.command("refund")(credit_refund)
credit_app.command("adjust")(credit_adjust)
