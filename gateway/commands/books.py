"""bulkhead invoice focus, reconcile, margin: charges as a FOCUS file, whether all books agree, what is left over."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.journal import read_journals
from gateway.billing.focus import focus_rows, write_focus
from gateway.billing.reconcile import Reconciliation, reconcile
from gateway.commands.directory import NANO_PER_USD, AsJson, exact, find_tenant, print_table
from gateway.commands.invoices import Month, Since, Until
from gateway.commands.invoices import invoice_app as invoice_app  # with the commands below, what cli.py mounts
from gateway.commands.periods import instant_of, period_of
from gateway.commands.session import CommandError, in_snapshot, open_session
from gateway.records.books import HOUSE, margin_record
from gateway.sequences import usage_by_request
from tenancy.access.directory import list_tenants
from tenancy.accounts.posting import CURRENCY
from tenancy.invoicing.periods import DAY_NS, period_start_ns
from tenancy.money import format_nano

COUNTS = ("num_requests", "num_prefill_tokens", "num_recomputed_tokens", "num_decode_steps")  # shown by `margin`


@invoice_app.command("focus")
def invoice_focus(
    out: Annotated[Path, typer.Option("--out", help="the CSV file to write")],
    month: Month = "",
    since: Since = "",
    until: Until = "",
    tenant: Annotated[str, typer.Option(help="only this tenant's")] = "",
) -> None:
    """Write what tenants were charged as a FOCUS 1.2 file."""
    session = open_session()
    since_ns, until_ns = period_of(month, since, until)
    if since_ns is None or since_ns >= until_ns:
        raise CommandError("an export needs --month, or --since and a later --until")

    async def work(conn: AsyncConnection) -> list[dict[str, str]]:
        tenants = [await find_tenant(conn, tenant)] if tenant else await list_tenants(conn)
        last_ns = min(until_ns, session.world.now_ns())  # later days have nothing yet
        return [row async for row in focus_rows(conn, tenants, since_ns, last_ns)]

    rows = in_snapshot(session, work)
    out.write_bytes(write_focus(rows))
    typer.echo(f"{out}: {len(rows):,} rows")


@invoice_app.command("reconcile")
def invoice_reconcile(
    day: Annotated[str, typer.Option(help="a UTC day; default: yesterday")] = "", as_json: AsJson = False
) -> None:
    """Compare engine, usage, ledger, invoices and export of a day; exit code 1 where they differ."""
    session = open_session()
    today_ns = period_start_ns("day", session.world.now_ns())
    since_ns = period_start_ns("day", instant_of(day, "--day")) if day else today_ns - DAY_NS
    journals = usage_by_request(read_journals(session.folders.journal))

    async def work(conn: AsyncConnection) -> Reconciliation:
        return await reconcile(conn, journals, since_ns, since_ns + DAY_NS)

    found = in_snapshot(session, work)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        typer.echo(
            f"{found.num_requests:,} requests ({found.num_unwitnessed:,} without a journal), "
            f"{found.num_documents:,} invoices: {found.num_differences:,} differences"
        )
        for one in found.differences:
            typer.echo(one)
    if found.num_differences:
        raise typer.Exit(1)


@invoice_app.command("margin")
def invoice_margin(
    cost_per_hour: Annotated[str, typer.Option(help="what an hour of the engine costs, a decimal number")],
    currency: Annotated[str, typer.Option(help="of that cost: ISO 4217; other tenants have no margin")] = CURRENCY,
    month: Month = "",
    since: Since = "",
    until: Until = "",
    as_json: AsJson = False,
) -> None:
    """What each tenant cost and left over, by the engine's time that its requests took; idle time is shown apart.

    A tenant with an account in another currency has its share and revenue, and no margin: nothing is exchanged.
    """
    session = open_session()
    since_ns, until_ns = period_of(month, since, until)
    until_ns = min(until_ns, session.world.now_ns())
    if since_ns is None or since_ns >= until_ns:
        raise CommandError("a margin needs --month, or --since and a later --until, that has begun")
    rate = exact(cost_per_hour, NANO_PER_USD, "--cost-per-hour")

    async def work(conn: AsyncConnection) -> dict[str, Any]:
        block_size = session.settings.block_size
        return await margin_record(
            conn, since_ns, until_ns, rate_nano_usd=rate, currency=currency, block_size=block_size
        )

    found = in_snapshot(session, work)
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = [
        (
            row["tenant"],
            *(f"{row[name]:,}" for name in COUNTS),
            f"{row['cache_token_seconds']:,}",
            f"{row['cache_block_ns'] / 1e9:,.1f}",
            f"{row['engine_ns'] / 3.6e12:.3f}",
            format_nano(row["revenue_nano_usd"], row["currency"]),
            format_nano(row["cost_nano_usd"], currency),
            "-" if row["margin_nano_usd"] is None else format_nano(row["margin_nano_usd"], currency),
        )
        for row in found["tenants"]
    ]
    nothing = ("",) * (len(COUNTS) + 2)
    for name in HOUSE:
        time_ns, cost = found[f"{name}_ns"], found[f"{name}_cost_nano_usd"]
        table.append((f"({name})", *nothing, f"{time_ns / 3.6e12:.3f}", "", format_nano(cost, currency), ""))
    counts = ("tenant", "requests", "prefill", "recomputed", "decode", "token-seconds", "block-seconds")
    print_table((*counts, "engine hours", "revenue", "cost", "margin"), table, numbers_from=1)
    if found["num_estimated"]:
        typer.echo(f"{found['num_estimated']:,} requests were not measured: their time is an estimate")
