"""bulkhead credit refund, adjust: what was billed or granted wrongly, set right by a new ledger transaction."""

from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.commands.directory import NANO_PER_USD, TenantName, clerk, exact, find_tenant
from gateway.commands.session import in_transaction, open_session
from tenancy.accounts.corrections import captured_hold, refundable_nano_usd
from tenancy.accounts.ledger import balance
from tenancy.accounts.posting import currency_of
from tenancy.money import format_nano

TransferId = Annotated[str, typer.Option(help="makes a repeat harmless")]
Why = Annotated[str, typer.Option("--reason", help="kept with the transfer and in the log")]


def credit_refund(
    request: Annotated[str, typer.Option(help="the request's id")],
    reason: Why,
    usd: Annotated[
        str, typer.Option(help="amount in the account's currency; default: all that is left to refund")
    ] = "",
    transfer_id: TransferId = "",
) -> None:
    """Give back what a request cost, or part of it; in total never more."""
    session = open_session()

    async def work(conn: AsyncConnection) -> tuple[str, str]:
        left_nano_usd = await refundable_nano_usd(conn, await captured_hold(conn, request))
        amount = exact(usd, NANO_PER_USD, "--usd") if usd else left_nano_usd
        one = clerk(session, conn)
        tenant_id = await one.refund(request, amount, transfer_id=transfer_id, reason=reason)
        credit, currency = (await balance(conn, tenant_id)).credit_nano_usd, await currency_of(conn, tenant_id)
        return format_nano(amount, currency), format_nano(credit, currency)

    amount, credit = in_transaction(session, work)
    typer.echo(f"{amount} of {request} refunded; the credit is now {credit}")


def credit_adjust(
    tenant: TenantName,
    usd: Annotated[str, typer.Option(help="amount in the account's currency, a decimal number")],
    reason: Why,
    take: Annotated[bool, typer.Option("--take/--give", help="less credit, or more")] = False,
    corrects: Annotated[str, typer.Option(help="the transfer that was wrong")] = "",
    transfer_id: TransferId = "",
) -> None:
    """Correct a tenant's credit, never below zero."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        found = await find_tenant(conn, tenant)
        amount = exact(usd, NANO_PER_USD, "--usd") * (-1 if take else 1)
        one = clerk(session, conn)
        await one.adjust_credit(found.tenant_id, amount, transfer_id=transfer_id, corrects_id=corrects, reason=reason)
        credit = (await balance(conn, found.tenant_id)).credit_nano_usd
        return format_nano(credit, await currency_of(conn, found.tenant_id))

    typer.echo(f"{tenant} now has {in_transaction(session, work)}")
