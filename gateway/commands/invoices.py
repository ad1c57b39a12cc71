"""bulkhead invoice: who sells and who is billed, drafts, issued documents and their files."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.billing.bookkeeper import Bookkeeper
from gateway.billing.wording import amount, day, describe, interval, quantity, unit_price
from gateway.commands.directory import AsJson, Reason, TenantName, exact, find_tenant, print_table
from gateway.commands.periods import period_of
from gateway.commands.session import CommandError, Session, in_snapshot, in_transaction, open_session
from gateway.records.invoices import (
    FILE_KINDS,
    InvoiceFile,
    figures_of,
    file_of,
    invoice_record,
    payments_record,
)
from tenancy.access.directory import list_tenants
from tenancy.invoicing.endings import open_of
from tenancy.invoicing.invoice_document import canonical
from tenancy.invoicing.invoices import Invoice, get_document, get_invoice, list_invoices
from tenancy.invoicing.parties import PAYMENT_DAYS_MAX, Buyer, Terms, find_issuer

BP_PER_PERCENT = 100

invoice_app = typer.Typer(no_args_is_help=True, help="Invoices, credit notes, exports and the books behind them.")

Prefix = Annotated[str, typer.Option("--prefix", help="its numbers read PREFIX-000001; names the issuer")]
Name = Annotated[str, typer.Option(help="as it stands on the document")]
Address = Annotated[str, typer.Option(help="lines, separated by line breaks or \\n")]
TaxId = Annotated[str, typer.Option(help="as it stands on the document")]
Id = Annotated[str, typer.Argument(help="the invoice's id, from: bulkhead invoice list")]
Month = Annotated[str, typer.Option(help="a calendar month (UTC), such as 2027-01")]
Since = Annotated[str, typer.Option(help="first instant: a day (UTC) or ISO 8601 with an offset")]
Until = Annotated[str, typer.Option(help="first instant after it")]


@invoice_app.command("issuer")
def invoice_issuer(
    prefix: Prefix,
    name: Name,
    address: Address = "",
    tax_id: TaxId = "",
    payment_details: Annotated[str, typer.Option(help="how to pay; lines as in --address")] = "",
    payment_days: Annotated[int, typer.Option(min=0, max=PAYMENT_DAYS_MAX, help="due this long after issue")] = 30,
) -> None:
    """Set who sells: copied into documents from now on. Numbers of a known prefix go on."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        issuer = await bookkeeper(session, conn).set_issuer(
            prefix,
            name=name,
            address=lines(address),
            tax_id=tax_id,
            payment_details=lines(payment_details),
            payment_days=payment_days,
        )
        return issuer.issuer_id

    typer.echo(in_transaction(session, work))


@invoice_app.command("buyer")
def invoice_buyer(
    tenant: TenantName,
    prefix: Prefix,
    terms: Annotated[Terms, typer.Option(help="paid credit is paid for already, or a limit on account")],
    name: Annotated[str, typer.Option(help="as it stands on the document; default: the tenant's name")] = "",
    address: Address = "",
    tax_id: TaxId = "",
    tax_percent: Annotated[str, typer.Option(help="a decimal number with at most two decimals")] = "0",
) -> None:
    """Set how a tenant is billed."""
    session = open_session()

    async def work(conn: AsyncConnection) -> None:
        found = await find_tenant(conn, tenant)
        issuer = await find_issuer(conn, prefix)
        if issuer is None:
            raise CommandError(f"there is no issuer with the prefix {prefix!r}; see: bulkhead invoice issuer --help")
        rate_bp = exact(tax_percent, BP_PER_PERCENT, "--tax-percent")
        buyer = Buyer(found.tenant_id, issuer.issuer_id, name or found.name, lines(address), tax_id, rate_bp, terms)
        await bookkeeper(session, conn).set_buyer(buyer)

    in_transaction(session, work)
    typer.echo(f"{tenant} is billed {terms.replace('_', ' ')}")


@invoice_app.command("draft")
def invoice_draft(tenant: TenantName, month: Month = "", since: Since = "", until: Until = "") -> None:
    """Set a period down for an invoice; without --since it begins where the last one ended."""
    session = open_session()
    since_ns, until_ns = period_of(month, since, until)

    async def work(conn: AsyncConnection) -> str:
        found = await find_tenant(conn, tenant)
        return (await bookkeeper(session, conn).draft(found.tenant_id, since_ns, until_ns)).invoice_id

    typer.echo(in_transaction(session, work))


@invoice_app.command("credit-note")
def invoice_credit_note(invoice: Id) -> None:
    """Draft a credit note of what was refunded of an issued invoice since."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        return (await bookkeeper(session, conn).draft_credit_note(invoice)).invoice_id

    typer.echo(in_transaction(session, work))


@invoice_app.command("issue")
def invoice_issue(invoice: Id) -> None:
    """Give a draft its number and store its document for good."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        figures = (await bookkeeper(session, conn).issue(invoice)).figures
        return f"{figures['number']}: {money(figures, 'due_minor')} due by {day(figures['due_ns'])}"

    typer.echo(in_transaction(session, work))


@invoice_app.command("pay")
def invoice_pay(
    invoice: Id,
    reference: Annotated[str, typer.Option(help="of the payment, kept with it and in the log")] = "",
    amount_text: Annotated[
        str, typer.Option("--amount", help="in the invoice's currency, a decimal number; default: all that is open")
    ] = "",
    payment_id: Annotated[str, typer.Option(help="a name for it: the same again changes nothing")] = "",
) -> None:
    """Note a payment of an invoice, of all that is open or of a part; of a credit note, that it was paid out."""
    session = open_session()

    async def work(conn: AsyncConnection) -> str:
        keeper = bookkeeper(session, conn)
        minor = None
        if amount_text:
            digits = (await get_document(conn, invoice)).figures["minor_digits"]
            minor = exact(amount_text, 10**digits, "--amount")
        after = await keeper.pay(invoice, reference, amount_minor=minor, payment_id=payment_id)
        if after.state == "paid":
            return f"{invoice} is paid"
        figures = await figures_of(conn, after)
        return f"{invoice}: {figures['currency']} {amount(figures, await open_of(conn, after))} are open"

    typer.echo(in_transaction(session, work))


@invoice_app.command("payments")
def invoice_payments(invoice: Id, as_json: AsJson = False) -> None:
    """List the payments of an invoice, in the order in which they came, and what is open."""
    session = open_session()

    found = in_snapshot(session, lambda conn: payments_record(conn, invoice))
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [
        (one["payment_id"], day(one["paid_ns"]), one["reference"], money(found | one, "amount_minor"))
        for one in found["payments"]
    ]
    rows.append(("", "", "open", money(found, "open_minor")))
    print_table(("payment", "on", "reference", "amount"), rows, numbers_from=3)


@invoice_app.command("void")
def invoice_void(invoice: Id, reason: Reason = "") -> None:
    """Make a draft or an issued invoice void; its period can be billed again."""
    session = open_session()

    async def work(conn: AsyncConnection) -> None:
        await bookkeeper(session, conn).void(invoice, reason)

    in_transaction(session, work)
    typer.echo(f"{invoice} is void")


@invoice_app.command("list")
def invoice_list(tenant: Annotated[str, typer.Option(help="only this tenant's")] = "", as_json: AsJson = False) -> None:
    """List invoices and credit notes, newest first."""
    session = open_session()

    async def work(conn: AsyncConnection) -> list[dict[str, Any]]:
        tenant_id = (await find_tenant(conn, tenant)).tenant_id if tenant else None
        names = {one.tenant_id: one.name for one in await list_tenants(conn)}
        return [await invoice_record(conn, one, names[one.tenant_id]) for one in await list_invoices(conn, tenant_id)]

    found = in_snapshot(session, work)
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [
        (
            one["invoice_id"],
            one["number"] or "-",
            one["kind"].replace("_", " "),
            one["state"],
            one["tenant"],
            interval(one),
            day(one["due_ns"]) if one["number"] else "-",
            money(one, "total_minor"),
            money(one, "due_minor"),
            money(one, "open_minor"),
        )
        for one in found
    ]
    columns = ("id", "number", "kind", "state", "tenant", "period (UTC)", "due by", "total", "due", "open")
    print_table(columns, rows, numbers_from=7)


@invoice_app.command("show")
def invoice_show(invoice: Id, as_json: AsJson = False) -> None:
    """Show an invoice: an issued one as it is stored, a draft as it would be now."""
    session = open_session()

    async def work(conn: AsyncConnection) -> tuple[Invoice, dict[str, Any], int]:
        one = await get_invoice(conn, invoice)
        return one, await figures_of(conn, one), await open_of(conn, one)

    one, figures, open_minor = in_snapshot(session, work)
    if as_json:
        typer.echo(canonical(figures))
        return
    number = figures["number"] or "draft"
    typer.echo(f"{one.kind.replace('_', ' ')} {number}, {one.state}, {figures['buyer']['name']}, {interval(figures)}")
    rows = [
        (*describe(line), quantity(line), unit_price(line), amount(figures, line["amount_minor"]))
        for line in figures["lines"]
    ]
    print_table(("for", "what", "detail", "quantity", "unit price", "amount"), rows, numbers_from=3)
    tax = f"{Decimal(figures['tax_rate_bp']) / BP_PER_PERCENT} %"
    names = (("net", "net_minor"), (f"tax {tax}", "tax_minor"), ("total", "total_minor"), ("due", "due_minor"))
    sums = [(label, money(figures, name)) for label, name in names]
    if one.issued_ns is not None:
        sums.append(("open", f"{figures['currency']} {amount(figures, open_minor)}"))
    print_table(("", ""), sums, numbers_from=1)


@invoice_app.command("export")
def invoice_export(
    invoice: Id,
    out: Annotated[Path, typer.Option("--out", help="the file to write; its ending says what: .pdf, .csv or .json")],
) -> None:
    """Write an invoice as PDF, CSV or JSON: of an issued one the same bytes each time."""
    kind = next((one for one in FILE_KINDS if out.suffix == f".{one}"), None)
    if kind is None:
        raise CommandError(f"{out} ends in none of .pdf, .csv and .json")
    session = open_session()

    async def work(conn: AsyncConnection) -> InvoiceFile:
        return await file_of(conn, await get_invoice(conn, invoice))

    data = in_snapshot(session, work).render(kind)
    out.write_bytes(data)
    typer.echo(f"{out}: {len(data):,} bytes")


def bookkeeper(session: Session, conn: AsyncConnection) -> Bookkeeper:
    return Bookkeeper(conn, session.world.entropy, session.world.now_ns())


def money(figures: dict[str, Any], name: str) -> str:
    return f"{figures['currency']} {amount(figures, figures[name])}"


def lines(text: str) -> str:
    return text.replace("\\n", "\n")
