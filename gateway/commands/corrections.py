"""bulkhead credit refund, adjust: what was billed or granted wrongly, set right by a new ledger transaction."""

from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.commands.directory import NANO_PER_USD, TenantName, clerk, exact, find_tenant
from gateway.commands.session import in_transaction, open_session
from tenancy.accounts.corrections import captured_hold, refundable_nano_usd
from tenancy.accounts.ledger import balance
from tenancy.money import format_nano_usd

TransferId = Annotated[str, typer.Option(help="makes a repeat harmless")]
Why = Annotated[str, typer.Option("--reason", help="kept with the transfer and in the log")]


def credit_refund(
    request: Annotated[str, typer.Option(help="the request's id")],
    reason: Why,
    usd: Annotated[str, typer.Option(help="amount in USD; default: all that is left to refund")] = "",
    transfer_id: TransferId = "",
) -> None:
    """Give back what a request cost, or part of it; in total never more."""
    session = open_session()

    async def work(conn: AsyncConnection) -> tuple[int, int]:
        left_nano_usd = await refundable_nano_usd(conn, await captured_hold(conn, request))
        amount = exact(usd, NANO_PER_USD, "--usd") if usd else left_nano_usd
        one = clerk(session, conn)
        tenant_id = await one.refund(request, amount, transfer_id=transfer_id, reason=reason)
        return amount, (await balance(conn, tenant_id)).credit_nano_usd

    amount, credit = in_transaction(session, work)
    typer.echo(f"{format_nano_usd(amount)} of {request} refunded; the credit is now {format_nano_usd(credit)}")


def credit_adjust(
    tenant: TenantName,
    usd: Annotated[str, typer.Option(help="amount in USD, a decimal number")],
    reason: Why,
    take: Annotated[bool, typer.Option("--take/--give", help="less credit, or more")] = False,
    corrects: Annotated[str, typer.Option(help="the transfer that was wrong")] = "",
    transfer_id: TransferId = "",
) -> None:
    """Correct a tenant's credit, never below zero."""
    session = open_session()

    async def work(conn: AsyncConnection) -> int:
        found = await find_tenant(conn, tenant)
        amount = exact(usd, NANO_PER_USD, "--usd") * (-1 if take else 1)
        one = clerk(session, conn)
        await one.adjust_credit(found.tenant_id, amount, transfer_id=transfer_id, corrects_id=corrects, reason=reason)
        return (await balance(conn, found.tenant_id)).credit_nano_usd

    typer.echo(f"{tenant} now has {format_nano_usd(in_transaction(session, work))}")
