"""Files of invoices are the same each time; the books agree, and a difference planted between any two is found."""

import asyncio
import csv
import io
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency import tables as audit_tables
from gateway.billing import focus
from gateway.billing.bookkeeper import Bookkeeper
from gateway.billing.csv_file import render_csv
from gateway.billing.focus import COLUMNS, focus_rows, write_focus
from gateway.billing.pdf import page_data, render_pdf
from gateway.billing.reconcile import reconcile, reconciled_entry, reconciled_since
from tenancy import tables
from tenancy.access.directory import list_tenants
from tenancy.invoicing.endings import pay
from tenancy.invoicing.invoice_document import digest
from tenancy.invoicing.invoice_tables import invoice_payment
from tenancy.invoicing.invoices import get_document
from tenancy.invoicing.parties import Buyer
from tenancy.invoicing.periods import DAY_NS
from tenancy.usage.meter import Usage
from tests.servers import owner_of
from tests.tenancy.books import MONTH_NS, Books, open_books
from tests.tenancy.conftest import database_url, opened, postgres_url, sqlite_url
from tests.tenancy.test_credit_line import post_paid_books
from tests.tenancy.test_invoices import add_prices, revenue_of
from tests.tenancy.world import counting_entropy

__all__ = ["database_url", "postgres_url", "sqlite_url"]

DAY = MONTH_NS + 3 * DAY_NS
# What the specification wants of usage and of no other charge here, and of every row.
OF_USAGE = (
    "ListUnitPrice",
    "ContractedUnitPrice",
    "PricingQuantity",
    "PricingUnit",
    "ConsumedQuantity",
    "ConsumedUnit",
)
OF_USAGE += ("PricingCategory", "SkuId", "SkuMeter", "SkuPriceId")
ALWAYS = ("BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd", "ListCost")
ALWAYS += ("BillingPeriodStart", "ChargeDescription", "ContractedCost", "EffectiveCost", "InvoiceIssuerName")
ALWAYS += ("ProviderName", "PublisherName", "ServiceCategory", "ServiceName", "PricingCurrency")


async def write_books(conn: AsyncConnection) -> tuple[Books, dict[str, Usage]]:
    """Two days of requests, one refund, an invoice of both days; and what the journals say of the requests."""
    books = await open_books(conn, counting_entropy(), promotional=1_000)
    await add_prices(conn, books.entropy)
    journals = {}
    for number in range(6):
        usage = Usage(50 + number, 7, 20)
        tier, model = ("batch", "s") if number % 2 else ("default", "m")
        request_id = await books.serve(usage, DAY + number * (DAY_NS // 3), tier=tier, model=model)
        journals[request_id] = usage
    await books.refund("req_acme_1", 100, DAY + 5, "=HYPERLINK(1)")
    await books.bill(DAY, DAY + 2 * DAY_NS)
    return books, journals


async def differences(conn: AsyncConnection, journals: dict[str, Usage], since_ns: int = DAY) -> list[str]:
    found = await reconcile(conn, journals, since_ns, since_ns + DAY_NS)
    assert found.num_differences == len(found.differences)
    return found.differences


def test_a_receivable_is_what_documents_say_is_due(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database:
            async with database.transaction() as conn:
                await conn.run_sync(audit_tables.metadata.create_all)
                books = await post_paid_books(conn)
                usage = Usage(1_000_000, 0, 100_000)
                journals = {await books.serve(usage, DAY + number * 10**9): usage for number in range(2)}
                invoice, _ = await books.bill(DAY, DAY + DAY_NS)
                assert await differences(conn, journals) == []
            async with database.read() as conn:  # always rolled back
                receivable = f"{books.who.tenant_id}:receivable:USD"
                await conn.execute(
                    text("UPDATE account SET balance_nano_usd = balance_nano_usd + 1 WHERE id = :of"),
                    {"of": receivable},
                )
                (found,) = await differences(conn, journals)
                assert found.startswith(f"ledger and invoice: {books.who.tenant_id} owes")
            async with database.read() as conn:  # paid, and nobody told the ledger
                await conn.execute(text("UPDATE invoice SET state = 'paid', ended_ns = 1"))
                assert len(await differences(conn, journals)) == 1
            planted = insert(invoice_payment).values(
                id="planted",
                invoice_id=invoice.invoice_id,
                tenant_id=books.who.tenant_id,
                amount_minor=1,
                reference="",
                paid_ns=1,
            )
            async with database.read() as conn:  # a payment that the ledger never saw
                await conn.execute(planted)
                (found,) = await differences(conn, journals)
                assert found.startswith(f"ledger and invoice: {books.who.tenant_id} owes")
            async with database.transaction() as conn:
                part = {"amount_minor": 5, "payment_id": "part", "now_ns": DAY + 3 * DAY_NS}
                await pay(conn, invoice.invoice_id, "", **part)
                assert await differences(conn, journals) == []
            async with database.transaction() as conn:
                await pay(conn, invoice.invoice_id, "", now_ns=DAY + 3 * DAY_NS)
                assert await differences(conn, journals) == []
            async with database.read() as conn:
                await conn.execute(planted)
                assert any("is paid, -1 minor units are open" in one for one in await differences(conn, journals))

    asyncio.run(run())


def test_books_agree_and_what_is_planted_between_two_is_found(database_url: str) -> None:
    async def run() -> None:
        async with opened(owner_of(database_url)) as database:  # who plants is not the server
            async with database.transaction() as conn:
                await conn.run_sync(audit_tables.metadata.create_all)
                books, journals = await write_books(conn)
            async with database.read() as conn:
                for since_ns in (DAY - DAY_NS, DAY, DAY + DAY_NS):
                    assert await differences(conn, journals, since_ns) == []
                found = await reconcile(conn, {}, DAY, DAY + DAY_NS)
                assert (found.num_requests, found.num_unwitnessed, found.num_documents) == (3, 3, 1)
                one = Usage(50, 7, 21)  # a token that was emitted and not charged
                (text_,) = await differences(conn, journals | {"req_acme_1": one})
                assert text_.startswith("engine and usage: req_acme_1 (stop)")
            of_one, of_two = "WHERE request_id = 'req_acme_1'", "WHERE request_id = 'req_acme_2'"
            of_three = "WHERE transaction_id = 'hold_acme_3:settle' AND account_id LIKE '%:revenue:%'"
            plants = [
                ("usage and ledger", "req_acme_1", f"UPDATE hold SET captured_nano_usd = 1 {of_one}"),
                ("usage and ledger", "req_acme_1", f"UPDATE usage_record SET request_id = 'x' {of_one}"),
                ("usage and prices", "req_acme_2", f"UPDATE usage_record SET tier = 'default' {of_two}"),
                ("usage and ledger", "req_acme_3", f"UPDATE ledger_entry SET amount_nano_usd = 0 {of_three}"),
                ("ledger and invoice", "BH-000001", f"UPDATE ledger_entry SET amount_nano_usd = 0 {of_three}"),
                ("ledger and invoice", "BH-000001", "UPDATE invoice_document SET document = document || ' '"),
            ]
            for pair, where, statement in plants:
                async with database.read() as conn:  # always rolled back
                    await without_triggers(conn)
                    await conn.execute(text(statement))
                    texts = await differences(conn, journals)
                    assert any(one.startswith(pair) and where in one for one in texts), (statement, texts)
            async with database.transaction() as conn:
                assert await differences(conn, journals) == []
                hold = tables.hold
                lost = {
                    "id": "hold_x",
                    "tenant_id": books.who.tenant_id,
                    "request_id": "req_x",
                    "price_id": books.who.price_id,
                    "amount_nano_usd": 5,
                    "state": "expired",
                    "captured_nano_usd": 0,
                    "created_ns": DAY,
                    "expires_ns": DAY,
                    "settled_ns": DAY + 1,
                }
                await conn.execute(insert(hold).values(lost))
                assert await differences(conn, journals) == []
                (text_,) = await differences(conn, journals | {"req_x": Usage(3, 0, 4)})
                assert text_.startswith("engine and usage: req_x is expired without usage")

                assert not await reconciled_since(conn, DAY)
                book_entry = reconciled_entry(await reconcile(conn, journals, DAY, DAY + DAY_NS), DAY + 7)
                assert book_entry.body["num_differences"] == 0

    asyncio.run(run())


async def without_triggers(conn: AsyncConnection) -> None:
    """As an intruder with the rights of the tables' owner would."""
    names = ("usage_record", "ledger_transaction", "ledger_entry", "invoice_document")
    for name in names:
        if conn.dialect.name == "postgresql":
            await conn.execute(text(f"ALTER TABLE {name} DISABLE TRIGGER USER"))
        else:
            await conn.execute(text(f"DROP TRIGGER {name}_no_update"))


def test_an_export_that_lacks_a_row_is_found(monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> None:
    real = focus._row

    def bent(account: Any, line: Any, *more: Any) -> Any:
        row = real(account, line, *more)
        return row | {"BilledCost": "0"} if line.kind == "output" else row

    async def run() -> None:
        async with opened(sqlite_url) as database, database.transaction() as conn:
            _, journals = await write_books(conn)
            monkeypatch.setattr(focus, "_row", bent)
            (found,) = await differences(conn, journals)
            assert found.startswith("ledger and export: ten_")

    asyncio.run(run())


def test_the_export_adds_up_and_keeps_the_format(sqlite_url: str) -> None:
    async def run() -> None:
        async with opened(sqlite_url) as database, database.transaction() as conn:
            books, _ = await write_books(conn)
            await books.refund("req_acme_2", 5, MONTH_NS + 40 * DAY_NS)
            tenants = await list_tenants(conn)
            rows = [row async for row in focus_rows(conn, tenants, MONTH_NS, MONTH_NS + 60 * DAY_NS)]
            read = list(csv.DictReader(io.StringIO(write_focus(rows).decode())))
            assert len(read) == len(rows)
            assert tuple(read[0]) == COLUMNS
            billed = sum(Decimal(row["BilledCost"]) for row in read if row["x_LedgerKind"] in focus.REVENUE_KINDS)
            assert billed * 10**9 == await revenue_of(conn, books)
            for row in read:
                usage = row["ChargeCategory"] == "Usage"
                assert row["ChargeCategory"] in ("Usage", "Credit", "Adjustment")
                assert ("e" in row["BilledCost"].lower()) is False
                for name in OF_USAGE:
                    assert (row[name] != "") is usage, name
                if usage:
                    cost = Decimal(row["ListUnitPrice"]) * Decimal(row["PricingQuantity"])
                    assert Decimal(row["ListCost"]) == cost == Decimal(row["ContractedCost"])
                    assert abs(cost - Decimal(row["BilledCost"])) <= Decimal("0.0000000005")
                for name in ALWAYS:
                    assert row[name]
                assert row["ChargePeriodStart"] < row["ChargePeriodEnd"]
                assert row["ChargePeriodStart"].endswith("Z")
                assert row["BillingPeriodStart"] <= row["ChargePeriodStart"] < row["BillingPeriodEnd"]
            refunds = [row for row in read if row["x_LedgerKind"] == "refund"]
            assert [row["ChargeClass"] for row in refunds] == ["", "Correction"]
            assert refunds[0]["ChargeDescription"] == "'=HYPERLINK(1)"
            assert {row["InvoiceId"] for row in read if row["x_LedgerKind"] == "input"} == {"BH-000001"}

    asyncio.run(run())


def test_files_of_a_document_are_the_same_each_time_and_add_up(sqlite_url: str) -> None:
    async def run() -> None:
        async with opened(sqlite_url) as database:
            async with database.transaction() as conn:
                _books, _ = await write_books(conn)
                invoice_id = (await conn.execute(text("SELECT invoice_id FROM invoice_document"))).scalar_one()
            async with database.read() as conn:
                document = await get_document(conn, invoice_id)
            figures = document.figures
            pdf = render_pdf(figures, document.sha256)
            assert pdf.startswith(b"%PDF-")
            assert pdf == render_pdf(document.figures, digest(document.text))
            page = page_data(figures, document.sha256)
            assert page["number"] == "BH-000001"
            assert not page["draft"]
            rows = list(csv.DictReader(io.StringIO(render_csv(figures).decode())))
            assert sum(Decimal(row["amount"]) for row in rows) * 100 == figures["due_minor"]
            exact = sum(Decimal(row["exact_amount"]) for row in rows if row["exact_amount"])
            assert exact * 10**9 == int(figures["exact_nano"])
            assert next(row for row in rows if row["type"] == "refund")["detail"] == "'=HYPERLINK(1)"

    asyncio.run(run())


def test_each_change_of_an_invoice_is_logged_once(sqlite_url: str) -> None:
    async def run() -> None:
        async with opened(sqlite_url) as database, database.transaction() as conn:
            await conn.run_sync(audit_tables.metadata.create_all)
            books, _ = await write_books(conn)
            until = DAY + 3 * DAY_NS
            keeper = Bookkeeper(conn, books.entropy, until + DAY_NS)
            who = books.who.tenant_id
            issuer = await keeper.set_issuer("NEW", name="n", address="", tax_id="", payment_details="", payment_days=1)
            await keeper.set_buyer(Buyer(who, issuer.issuer_id, "b", "", "", 0, "prepaid"))
            drafted = await keeper.draft(who, None, until)
            assert await keeper.issue(drafted.invoice_id) == await keeper.issue(drafted.invoice_id)
            for _ in range(2):
                await keeper.void(drafted.invoice_id, "typo")
            other = await keeper.draft(who, None, until)
            await keeper.issue(other.invoice_id)
            for _ in range(2):
                await keeper.pay(other.invoice_id, "wire")
            kinds = list(await conn.scalars(text("SELECT kind FROM outbox ORDER BY id")))
            names = ["issuer_set", "buyer_set", "drafted", "issued", "voided", "drafted", "issued", "payment", "paid"]
            assert kinds == [f"invoice.{name}" for name in names]

    asyncio.run(run())
