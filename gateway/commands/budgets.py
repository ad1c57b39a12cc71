"""bulkhead budget: what a tenant, project or key may spend in a day, a month or in all."""

from typing import Annotated, Any

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.commands.directory import NANO_PER_USD, AsJson, Listed, clerk, exact, find_tenant, print_list
from gateway.commands.session import in_transaction, open_session
from gateway.records.money import budget_records
from tenancy.access.directory import list_tenants
from tenancy.accounts.budget_use import BudgetScope
from tenancy.accounts.posting import currency_of
from tenancy.invoicing.periods import Period
from tenancy.money import format_nano

budget_app = typer.Typer(no_args_is_help=True, help="Budgets per day, month or in all.")

Scope = Annotated[BudgetScope, typer.Option(help="what is limited")]
Of = Annotated[str, typer.Option(help="a tenant's name, a project's or key's id")]
PeriodOption = Annotated[Period, typer.Option(help="in UTC")]
Hard = Annotated[bool, typer.Option("--hard/--soft", help="refuse and cut what it does not cover, or only alert")]


@budget_app.command("set")
def budget_set(
    scope: Scope,
    of: Of,
    period: PeriodOption,
    usd: Annotated[str, typer.Option(help="amount in the account's currency, a decimal number")],
    hard: Hard = True,
) -> None:
    """Set or change one budget. What was spent in the period before counts."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        limit_nano_usd = exact(usd, NANO_PER_USD, "--usd")
        scope_id = await find_scope(conn, scope, of)
        tenant_id = await clerk(session, conn).set_budget(
            scope, scope_id, period, hard=hard, limit_nano_usd=limit_nano_usd
        )
        return format_nano(limit_nano_usd, await currency_of(conn, tenant_id))

    typer.echo(f"the {kind_of(hard)} {period} budget of {scope} {of} is {in_transaction(session, work)}")


@budget_app.command("remove")
def budget_remove(scope: Scope, of: Of, period: PeriodOption, hard: Hard = True) -> None:
    """Remove one budget."""
    session = open_session()

    async def work(conn: AsyncConnection) -> None:
        await clerk(session, conn).remove_budget(await find_scope(conn, scope, of), period, hard=hard)

    in_transaction(session, work)
    typer.echo(f"the {kind_of(hard)} {period} budget of {scope} {of} is removed")


@budget_app.command("list")
def budget_list(tenant: Annotated[str, typer.Option(help="only this tenant")] = "", as_json: AsJson = False) -> None:
    """List budgets with what is used and held in the period that runs, and the highest alert that was given."""
    session = open_session()

    async def work(conn: AsyncConnection) -> Listed:
        tenants = [await find_tenant(conn, tenant)] if tenant else await list_tenants(conn)
        return [
            (budget_row(one.name, use), use)
            for one in tenants
            for use in await budget_records(conn, one.tenant_id, session.world.now_ns())
        ]

    columns = ("tenant", "of", "period", "kind", "alerted", "used", "held", "limit")
    print_list(columns, in_transaction(session, work), as_json, numbers_from=4)


def budget_row(tenant: str, use: dict[str, Any]) -> tuple[str, ...]:
    budget = use["budget"]
    amounts = (use["used_nano_usd"], use["held_nano_usd"], budget["limit_nano_usd"])
    return (
        tenant,
        f"{budget['scope_kind']} {budget['scope_id']}",
        budget["period"],
        kind_of(budget["hard"]),
        f"{use['alerted_percent']} %" if use["alerted_percent"] else "-",
        *(format_nano(amount, use["currency"]) for amount in amounts),
    )


async def find_scope(conn: AsyncConnection, scope: BudgetScope, of: str) -> str:
    return (await find_tenant(conn, of)).tenant_id if scope == "tenant" else of


def kind_of(hard: bool) -> str:
    return "hard" if hard else "soft"
