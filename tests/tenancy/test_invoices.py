"""Invoices bill the ledger, all of it and each part once; what was issued never changes; numbers have no gaps."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.accounts.ledger import Hold, place_hold
from tenancy.accounts.ledger import void as void_hold
from tenancy.invoicing.endings import pay, void
from tenancy.invoicing.invoice_document import apportion, canonical, digest, lines_of, minor_digits, tax_minor, to_minor
from tenancy.invoicing.invoices import (
    SETTLE_NS,
    InvoiceError,
    draft_credit_note,
    draft_invoice,
    get_document,
    get_invoice,
    issue,
    lines_now,
    list_invoices,
    preview,
)
from tenancy.invoicing.parties import Buyer, PartyError, set_buyer
from tenancy.invoicing.periods import DAY_NS
from tenancy.pricing.price_book import PriceTerms, schedule
from tenancy.pricing.prices import Step
from tenancy.usage.meter import Usage
from tests.tenancy.books import MONTH_NS, Books, open_books
from tests.tenancy.conftest import create_tables, opened
from tests.tenancy.world import SECOND, T0, counting_entropy

amounts = st.lists(st.integers(-(10**13), 10**13), max_size=20)


@given(amounts=amounts, currency=st.sampled_from(["USD", "JPY", "BHD"]))
def test_lines_add_up_to_the_amount_that_was_rounded_once(amounts: list[int], currency: str) -> None:
    unit = 10 ** (9 - minor_digits(currency))
    minor = apportion(amounts, currency)
    assert sum(minor) == to_minor(sum(amounts), currency) == round(sum(amounts) / unit) or abs(sum(amounts)) > 2**50
    assert all(abs(part * unit - amount) < unit for part, amount in zip(minor, amounts, strict=True))


def test_tax_is_rounded_half_to_even() -> None:
    assert [tax_minor(net, 1_900) for net in (50, 150, 250, -50)] == [10, 28, 48, -10]  # 9.5, 28.5, 47.5, -9.5


STEPPED = PriceTerms("s", 1_000, 500, 4_000, 7, batch_percent=50, priority_percent=250, steps=(Step(40, 10, 9, 8),))
OWN_BATCH = PriceTerms("m", 111, 11, 333, tier="batch")
moments = st.integers(0, 89)  # days
operations = st.lists(
    st.one_of(
        st.tuples(st.just("serve"), st.integers(0, 30), st.integers(0, 30), st.sampled_from(["m", "s"]), st.booleans()),
        st.tuples(st.just("refund"), st.integers(0, 20), st.integers(1, 100)),
        st.tuples(st.just("adjust"), st.integers(-5_000, 5_000).filter(bool)),
        st.tuples(st.just("days"), st.integers(1, 20)),
    ),
    max_size=14,
)


@given(operations=operations, terms=st.sampled_from(["prepaid", "on_account"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
def test_everything_is_billed_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, operations: list[Any], terms: Any
) -> None:
    """Monthly invoices and their credit notes, over any history: together they are the revenue account."""
    url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('invoices') / 'bulkhead.db'}"

    async def run() -> None:
        await create_tables(url)
        entropy = counting_entropy()
        async with opened(url) as database, database.transaction() as conn:
            books = await open_books(conn, entropy, terms=terms, tax_rate_bp=0, promotional=30)
            await add_prices(conn, entropy)
            day, end = 0, MONTH_NS + 90 * DAY_NS
            for operation in operations:
                at_ns = MONTH_NS + min(day, 89) * DAY_NS + books.num_requests + books.num_transfers
                await perform(books, operation, at_ns)
                day += operation[1] if operation[0] == "days" else 0
            issued = [await books.bill(since, since + 30 * DAY_NS) for since in range(MONTH_NS, end, 30 * DAY_NS)]
            notes = []
            for invoice, _ in issued:
                try:
                    note = await draft_credit_note(conn, invoice.invoice_id, entropy=entropy, now_ns=end + 2 * DAY_NS)
                except InvoiceError:
                    continue  # nothing was refunded later
                notes.append((note, await issue(conn, note.invoice_id, now_ns=end + 3 * DAY_NS)))
            billed = 0
            for made, document in [*issued, *notes]:
                figures = document.figures
                lines = lines_of(figures)
                assert lines == await lines_now(conn, made)  # the ledger still says so
                revenue = sum(line.exact_nano for line in lines if line.kind not in ("promotional", "adjustment"))
                billed += revenue
                assert sum(int(line["exact_nano"]) for line in figures["lines"]) == int(figures["exact_nano"])
                assert sum(line["amount_minor"] for line in figures["lines"]) == figures["net_minor"]
                if terms == "prepaid":
                    assert figures["due_minor"] == 0  # credit has covered it: promotional as discount, paid as payment
            assert billed == await revenue_of(conn, books)
            usage = [line for made, d in issued for line in lines_of(d.figures) if line.kind == "output"]
            assert sum(line.quantity for line in usage) == await num_completion_tokens(conn)

    asyncio.run(run())


async def add_prices(conn: AsyncConnection, entropy: Any) -> None:
    await schedule(conn, STEPPED, effective_from_ns=T0, entropy=entropy, now_ns=T0)
    await schedule(conn, OWN_BATCH, effective_from_ns=MONTH_NS + 20 * DAY_NS, entropy=entropy, now_ns=T0)


async def perform(books: Books, operation: Any, at_ns: int) -> None:
    match operation:
        case ("serve", prompt, completion, model, batch):
            usage = Usage(prompt, prompt // 3, completion)
            await books.serve(usage, at_ns, tier="batch" if batch else "default", model=model)
        case ("refund", which, percent) if books.charged:
            request_id = sorted(books.charged)[which % len(books.charged)]
            amount = books.charged[request_id] * percent // 100
            if amount:
                books.charged[request_id] -= amount
                await books.refund(request_id, amount, at_ns)
        case ("adjust", amount):
            await books.adjust(amount, at_ns)


async def revenue_of(conn: AsyncConnection, books: Books) -> int:
    account = tables.account
    query = select(account.c.balance_nano_usd).where(
        account.c.tenant_id == books.who.tenant_id, account.c.kind == "revenue"
    )
    return await conn.scalar(query) or 0


async def num_completion_tokens(conn: AsyncConnection) -> int:
    return int(await conn.scalar(select(func.coalesce(func.sum(tables.usage_record.c.num_completion_tokens), 0))) or 0)


def test_an_invoice_by_hand(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            books = await open_books(conn, entropy, promotional=1_000)
            await add_prices(conn, entropy)
            at_ns = MONTH_NS + DAY_NS
            request_id = await books.serve(Usage(1_000, 300, 11), at_ns)  # 105000 + 4500 + 6600 nano-USD
            await books.serve(Usage(4, 0, 1), at_ns, tier="batch", model="s")  # half of 4 + 4 + 7
            await books.serve(Usage(34, 5, 10), at_ns, model="s")  # from token 5: 2.5 + 29 + 4 + 9 * 0.008 + 7
            await books.refund(request_id, 100, at_ns + 1, "too slow")
            await books.adjust(50, at_ns + 2)
            await books.adjust(-70, at_ns + 3, corrects_id="grant_acme")  # a grant was too large: nothing was sold
            await books.serve(Usage(1, 0, 1), MONTH_NS + 31 * DAY_NS)  # the next period's first instant
            invoice, document = await books.bill(MONTH_NS, MONTH_NS + 31 * DAY_NS)
            figures = document.figures
            rows = [
                (line["kind"], line["model"], line["tier"], line["step"], line["quantity"], int(line["exact_nano"]))
                for line in figures["lines"]
            ]
            assert rows == [
                ("input", "m", "default", 0, 700, 105_000),
                ("cached_input", "m", "default", 0, 300, 4_500),
                ("output", "m", "default", 0, 11, 6_600),
                ("input", "s", "batch", 0, 4, 2),
                ("output", "s", "batch", 0, 1, 2),
                ("request", "s", "batch", 0, 1, 4),  # 3.5, to even
                ("input", "s", "default", 0, 29, 29),
                ("cached_input", "s", "default", 0, 5, 2),  # 2.5, to even
                ("output", "s", "default", 0, 1, 4),
                ("request", "s", "default", 0, 1, 7),
                ("output", "s", "default", 1, 9, 0),
                ("rounding", "", "", 0, 0, 1),  # the second request was 42.572: 43
                ("promotional", "", "", 0, 0, -1_000),
                ("refund", "m", "default", 0, 1, -100),
                ("adjustment", "", "", 0, 1, -50),
            ]
            assert figures["number"] == "BH-000001"
            assert figures["buyer"]["name"] == "acme GmbH"
            assert (figures["net_minor"], figures["tax_minor"], figures["due_minor"]) == (
                0,
                0,
                0,
            )
            assert int(figures["due_ns"]) == MONTH_NS + (31 + 1 + 14) * DAY_NS
            assert document.sha256 == digest(document.text)
            assert canonical(json.loads(document.text)) == document.text
            with pytest.raises(DBAPIError, match=r"append-only|permission denied"):
                async with conn.begin_nested():
                    await conn.execute(text("UPDATE invoice_document SET number = 7"))
            assert await get_document(conn, invoice.invoice_id) == document

    asyncio.run(run())


def test_what_was_issued_stays_whatever_is_changed_after_it(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            books = await open_books(conn, entropy)
            request_id = await books.serve(Usage(10**6, 0, 10**6), MONTH_NS)
            until = MONTH_NS + 31 * DAY_NS
            invoice, document = await books.bill(MONTH_NS, until)
            await set_buyer(
                conn,
                Buyer(books.who.tenant_id, books.issuer.issuer_id, "other", "", "", 700, "prepaid"),
                now_ns=until,
            )
            await schedule(conn, PriceTerms("m", 1, 1, 1), effective_from_ns=until, entropy=entropy, now_ns=until)
            await books.refund(request_id, 5_000_000, until + DAY_NS)
            assert await issue(conn, invoice.invoice_id, now_ns=until + 9 * DAY_NS) == document  # again: the same
            assert lines_of(document.figures) == await lines_now(conn, invoice)
            note = await draft_credit_note(conn, invoice.invoice_id, entropy=entropy, now_ns=until + 2 * DAY_NS)
            with pytest.raises(InvoiceError, match="nothing"):
                await draft_credit_note(conn, invoice.invoice_id, entropy=entropy, now_ns=until + 3 * DAY_NS)
            with pytest.raises(InvoiceError, match=note.invoice_id):
                await void(conn, invoice.invoice_id, "", now_ns=until + 3 * DAY_NS)
            figures = (await issue(conn, note.invoice_id, now_ns=until + 3 * DAY_NS)).figures
            assert (figures["number"], figures["corrects"]) == ("BH-000002", "BH-000001")
            assert figures["exact_nano"] == "-5000000"
            assert figures["net_minor"] == 0
            assert (await pay(conn, invoice.invoice_id, "wire 7", now_ns=until + 4 * DAY_NS)).state == "paid"
            with pytest.raises(InvoiceError, match="is paid"):
                await pay(conn, invoice.invoice_id, "wire 8", now_ns=until + 4 * DAY_NS)

    asyncio.run(run())


def test_periods_do_not_overlap_and_are_over(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            books = await open_books(conn, entropy)
            tenant_id, until = books.who.tenant_id, MONTH_NS + 10 * DAY_NS

            async def draft(since_ns: int | None, until_ns: int) -> Any:
                return await draft_invoice(
                    conn, tenant_id, since_ns=since_ns, until_ns=until_ns, entropy=entropy, now_ns=until
                )

            first = await draft(None, until)
            assert first.since_ns == T0  # when the tenant began
            for since_ns, until_ns in ((until - 1, until + 1), (T0 - 5, T0 + 1), (T0 + 1, T0 + 2)):
                with pytest.raises(InvoiceError, match="overlaps"):
                    await draft(since_ns, until_ns)
            with pytest.raises(InvoiceError, match="after it begins"):
                await draft(until, until)
            second = await draft(None, until + 1)
            assert (second.since_ns, second.until_ns) == (until, until + 1)
            with pytest.raises(InvoiceError, match="not over"):
                await issue(conn, first.invoice_id, now_ns=until + SETTLE_NS - 1)
            hold = await place_hold(
                conn,
                hold_id="hold_open",
                tenant_id=tenant_id,
                request_id="req_open",
                price_id=books.who.price_id,
                amount_nano_usd=1,
                expires_ns=until + DAY_NS,
                now_ns=until - 1,
            )
            assert isinstance(hold, Hold)
            with pytest.raises(InvoiceError, match="hold_open"):
                await issue(conn, first.invoice_id, now_ns=until + SETTLE_NS)
            await void_hold(conn, "hold_open", until + 5)
            await issue(conn, first.invoice_id, now_ns=until + SETTLE_NS)
            assert (await void(conn, first.invoice_id, "wrong name", now_ns=until + DAY_NS)).state == "void"
            again = await draft(T0, until)  # the period is free again; the number stays used
            figures = (await issue(conn, again.invoice_id, now_ns=until + DAY_NS)).figures
            assert figures["number"] == "BH-000002"
            assert (await get_document(conn, first.invoice_id)).number == 1
            with pytest.raises(InvoiceError, match="cannot become paid"):
                await pay(conn, first.invoice_id, "", now_ns=until + DAY_NS)
            with pytest.raises(InvoiceError, match="cannot become issued"):
                await issue(conn, first.invoice_id, now_ns=until + DAY_NS)
            assert {one.state for one in await list_invoices(conn, tenant_id)} == {"void", "draft", "issued"}

    asyncio.run(run())


def test_numbers_have_no_gaps_however_many_are_issued_at_once(database_url: str) -> None:
    """Ten tenants of one issuer at once; two of the transactions roll back after they have their number."""

    async def run() -> None:
        entropy, now_ns = counting_entropy(), MONTH_NS + 40 * DAY_NS
        async with opened(database_url) as database:
            async with database.transaction() as conn:
                drafts = []
                organisation_id = None
                for name in "abcdefghij":
                    books = await open_books(conn, entropy, name=name, organisation_id=organisation_id)
                    organisation_id = books.who.organisation_id
                    drafts.append(
                        await draft_invoice(
                            conn, books.who.tenant_id, since_ns=None, until_ns=MONTH_NS, entropy=entropy, now_ns=now_ns
                        )
                    )

            async def one(number: int, invoice_id: str) -> None:
                async with database.transaction() as conn:
                    await issue(conn, invoice_id, now_ns=now_ns)
                    if number in (2, 5):
                        raise ArithmeticError

            results = await asyncio.gather(
                *(one(number, draft.invoice_id) for number, draft in enumerate(drafts)), return_exceptions=True
            )
            assert [type(result) for result in results].count(ArithmeticError) == 2
            assert sum(result is not None for result in results) == 2, results
            async with database.read() as conn:
                issued = [d for d in drafts if (await get_invoice(conn, d.invoice_id)).state == "issued"]
                numbers = sorted([(await get_document(conn, draft.invoice_id)).number for draft in issued])
                assert numbers == list(range(1, 9))

    asyncio.run(run())


def test_a_tenant_that_nobody_bills(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            with pytest.raises(PartyError, match="invoice buyer"):
                await draft_invoice(conn, "ten_x", since_ns=0, until_ns=1, entropy=entropy, now_ns=2)
            with pytest.raises(InvoiceError, match="invoice list"):
                await get_invoice(conn, "inv_x")
            books = await open_books(conn, entropy)
            drafted = await draft_invoice(
                conn, books.who.tenant_id, since_ns=None, until_ns=MONTH_NS, entropy=entropy, now_ns=MONTH_NS
            )
            assert (await preview(conn, drafted))["number"] == ""
            with pytest.raises(InvoiceError, match="never issued"):
                await get_document(conn, drafted.invoice_id)
            with pytest.raises(InvoiceError, match="no issued invoice"):
                await draft_credit_note(conn, drafted.invoice_id, entropy=entropy, now_ns=MONTH_NS + SECOND)

    asyncio.run(run())
