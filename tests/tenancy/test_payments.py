"""Payments of invoices in parts: never more than what is open, each once; an invoice is paid when nothing is open."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.accounts.credit_line import CreditLineError, get_line, set_limit
from tenancy.accounts.ledger import balance
from tenancy.accounts.ledger_check import check_ledger
from tenancy.accounts.posting import lock_all_accounts
from tenancy.invoicing.endings import open_of, pay, void
from tenancy.invoicing.invoices import (
    InvoiceError,
    draft_credit_note,
    get_document,
    get_invoice,
    issue,
)
from tenancy.invoicing.payments import PAYMENTS_MAX, payments_of
from tenancy.invoicing.periods import DAY_NS
from tenancy.usage.meter import Usage
from tests.tenancy.books import MONTH_NS, Books, open_books
from tests.tenancy.conftest import create_tables, opened
from tests.tenancy.world import SECOND, counting_entropy

LIMIT = 10**12
PAID_NS = MONTH_NS + 3 * DAY_NS
CENT = 10**7  # nano-units
payments = st.lists(
    st.tuples(st.integers(-1, 40), st.sampled_from("abcdef"), st.sampled_from(["", "wire"])), max_size=9
)


async def post_paid(conn: AsyncConnection, *, tax_rate_bp: int = 1_900) -> Books:
    """Ten cents of its own credit, then a line."""
    books = await open_books(conn, counting_entropy(), tax_rate_bp=tax_rate_bp)
    credit = (await balance(conn, books.who.tenant_id)).credit_nano_usd
    await books.adjust(10 * CENT - credit, MONTH_NS, corrects_id="grant_acme")
    await set_limit(conn, books.who.tenant_id, LIMIT, transfer_id="limit", now_ns=MONTH_NS)
    return books


@given(payments=payments, line=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_an_invoice_takes_what_is_open_and_each_payment_once(
    tmp_path_factory: pytest.TempPathFactory, payments: list[tuple[int, str, str]], line: bool
) -> None:
    """Any payments, some of them again, some with another's id, against a dict of them."""
    url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('payments') / 'bulkhead.db'}"

    async def run() -> None:
        await create_tables(url)
        async with opened(url) as database, database.transaction() as conn:
            books = await (post_paid(conn) if line else open_books(conn, counting_entropy()))
            await books.serve(Usage(1_000_003, 0, 333_333), MONTH_NS + SECOND)  # 35 cents, and a part of one
            invoice, document = await books.bill(MONTH_NS, MONTH_NS + DAY_NS)
            due, noted = document.figures["due_minor"], dict[str, tuple[int, str]]()
            for amount, payment_id, reference in payments:
                left = due - sum(paid for paid, _ in noted.values())
                good = noted[payment_id] == (amount, reference) if payment_id in noted else 0 < amount <= left
                call = {"amount_minor": amount, "payment_id": payment_id, "now_ns": PAID_NS}
                if good:
                    await pay(conn, invoice.invoice_id, reference, **call)  # type: ignore[arg-type]
                    noted[payment_id] = amount, reference
                else:
                    with pytest.raises(InvoiceError):
                        await pay(conn, invoice.invoice_id, reference, **call)  # type: ignore[arg-type]
                await agrees(conn, books, invoice.invoice_id, due - sum(paid for paid, _ in noted.values()))
            made = await payments_of(conn, invoice.invoice_id)
            assert {one.payment_id: (one.amount_minor, one.reference) for one in made} == noted
            if (await get_invoice(conn, invoice.invoice_id)).state == "issued":
                await pay(conn, invoice.invoice_id, "the rest", now_ns=PAID_NS)
            await agrees(conn, books, invoice.invoice_id, 0)
            assert await get_document(conn, invoice.invoice_id) == document  # what was issued says what was due

    asyncio.run(run())


async def agrees(conn: AsyncConnection, books: Books, invoice_id: str, open_minor: int) -> None:
    one = await get_invoice(conn, invoice_id)
    assert await open_of(conn, one) == open_minor
    assert one.state == ("issued" if open_minor else "paid")
    line = await get_line(conn, books.who.tenant_id)
    if line is not None:
        assert line.receivable_nano_usd == open_minor * CENT
        assert (line.drawn_nano_usd == 0) is (open_minor == 0)
    assert (await check_ledger(conn)).ok


def test_parts_free_the_line_in_proportion_and_a_part_makes_it_too_late_to_void(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            books = await post_paid(conn, tax_rate_bp=10_000)  # what is due is twice what was used
            tenant_id = books.who.tenant_id
            request_id = await books.serve(Usage(1_000_000, 0, 1_000_000), MONTH_NS + SECOND)
            drawn = books.charged[request_id] - 10 * CENT
            invoice, document = await books.bill(MONTH_NS, MONTH_NS + DAY_NS)
            due, of = document.figures["due_minor"], invoice.invoice_id
            part = 20
            assert drawn * part % due, "a share that is rounded"
            await pay(conn, of, "first", amount_minor=part, payment_id="first", now_ns=PAID_NS)
            line = await get_line(conn, tenant_id)
            assert line is not None
            assert line.drawn_nano_usd == drawn - drawn * part // due
            for wrong in ("it was somebody else's", "again"):
                with pytest.raises(InvoiceError, match="are paid: it cannot become void"):
                    await void(conn, of, wrong, now_ns=PAID_NS)
            with pytest.raises(InvoiceError, match="id of something else"):
                await pay(conn, of, "", amount_minor=1, payment_id="limit", now_ns=PAID_NS)
            with pytest.raises(InvoiceError, match="id of its own"):
                await pay(conn, of, "", amount_minor=1, now_ns=PAID_NS)
            transactions = text("SELECT id FROM ledger_transaction WHERE kind = 'payment' AND corrects_id = :issued")
            assert list(await conn.scalars(transactions, {"issued": f"{of}:issued"})) == ["first"]
            with pytest.raises(DBAPIError, match=r"append-only|permission denied"):
                async with conn.begin_nested():
                    await conn.execute(text("UPDATE invoice_payment SET amount_minor = 1"))
            # What was wrong is refunded: its credit note is paid out in two parts, while there is room for them.
            await books.refund(request_id, books.charged[request_id], PAID_NS)
            note = await draft_credit_note(conn, of, entropy=books.entropy, now_ns=PAID_NS + DAY_NS)
            back = (await issue(conn, note.invoice_id, now_ns=PAID_NS + DAY_NS)).figures["due_minor"]
            assert back < 0
            await pay(conn, note.invoice_id, "", amount_minor=-back // 3, payment_id="out", now_ns=PAID_NS + DAY_NS)
            with pytest.raises(InvoiceError, match="are open"):
                await pay(conn, note.invoice_id, "", amount_minor=-back, payment_id="more", now_ns=PAID_NS + DAY_NS)
            paid_out = await pay(conn, note.invoice_id, "", now_ns=PAID_NS + DAY_NS)
            assert paid_out.state == "paid"
            parts = [one.amount_minor for one in await payments_of(conn, note.invoice_id)]
            assert sorted(parts) == sorted([-(-back // 3), back + -back // 3])
            await pay(conn, of, "the rest", now_ns=PAID_NS + DAY_NS)
            line = await get_line(conn, tenant_id)
            assert line is not None
            assert (line.receivable_nano_usd, line.left_nano_usd) == (0, LIMIT)
            assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_payments_at_once_are_never_more_than_is_open(postgres_url: str) -> None:
    """Thirty payments of a tenth, ten of them twice, and voids between them: ten go in, or the void alone."""

    async def run() -> None:
        async with opened(postgres_url) as database:
            async with database.transaction() as conn:
                books = await post_paid(conn)
                await books.serve(Usage(2_000_000, 0, 1_000_000), MONTH_NS + SECOND)
                invoice, document = await books.bill(MONTH_NS, MONTH_NS + DAY_NS)
            part, of = document.figures["due_minor"] // 10, invoice.invoice_id
            assert part > 0

            async def one(number: int) -> None:
                with suppress(InvoiceError):
                    async with database.transaction() as conn:
                        how: dict[str, Any] = {"amount_minor": part, "payment_id": f"pay_{number % 20}"}
                        await pay(conn, of, "", now_ns=PAID_NS, **how)

            async def undo() -> None:
                with suppress(InvoiceError):
                    async with database.transaction() as conn:
                        await void(conn, of, "", now_ns=PAID_NS)

            await asyncio.gather(*(one(number) for number in range(15)), undo(), *(one(number) for number in range(30)))
            async with database.transaction() as conn:
                made, now = await payments_of(conn, of), await get_invoice(conn, of)
                if now.state == "void":
                    assert made == []
                else:
                    assert len(made) == 10
                    await agrees(conn, books, of, document.figures["due_minor"] - 10 * part)
                accounts = await lock_all_accounts(conn, books.who.tenant_id)
                open_minor = 0 if now.state == "void" else document.figures["due_minor"] - 10 * part
                assert accounts["receivable"] == -open_minor * CENT
                assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_the_number_of_payments_has_an_end(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PAYMENTS_MAX >= 100
    monkeypatch.setattr("tenancy.invoicing.endings.PAYMENTS_MAX", 3)

    async def run() -> None:
        async with opened(sqlite_url) as database, database.transaction() as conn:
            books = await open_books(conn, counting_entropy())
            await books.serve(Usage(1_000_000, 0, 0), MONTH_NS + SECOND)
            invoice, _ = await books.bill(MONTH_NS, MONTH_NS + DAY_NS)
            for name in ("a", "b"):
                await pay(conn, invoice.invoice_id, "", amount_minor=1, payment_id=name, now_ns=PAID_NS)
            with pytest.raises(InvoiceError, match="at once"):
                await pay(conn, invoice.invoice_id, "", amount_minor=1, payment_id="c", now_ns=PAID_NS)
            assert (await pay(conn, invoice.invoice_id, "", now_ns=PAID_NS)).state == "paid"

    asyncio.run(run())


def test_a_credit_note_is_paid_out_in_parts_while_its_room_is_free(sqlite_url: str) -> None:
    async def run() -> None:
        async with opened(sqlite_url) as database, database.transaction() as conn:
            books = await post_paid(conn, tax_rate_bp=0)
            tenant_id = books.who.tenant_id
            request_id = await books.serve(Usage(3_000_000, 0, 0), MONTH_NS + SECOND)
            invoice, _ = await books.bill(MONTH_NS, MONTH_NS + DAY_NS)
            await pay(conn, invoice.invoice_id, "", now_ns=PAID_NS)
            await books.refund(request_id, books.charged[request_id], PAID_NS)
            note = await draft_credit_note(conn, invoice.invoice_id, entropy=books.entropy, now_ns=PAID_NS + DAY_NS)
            await issue(conn, note.invoice_id, now_ns=PAID_NS + DAY_NS)
            line = await get_line(conn, tenant_id)
            assert line is not None
            freed = line.left_nano_usd - LIMIT  # the refund's room, above the limit until it is paid out
            assert freed > 0
            await set_limit(conn, tenant_id, 0, transfer_id="none", now_ns=PAID_NS + DAY_NS)
            await pay(conn, note.invoice_id, "", amount_minor=1, payment_id="cent", now_ns=PAID_NS + DAY_NS)
            credit = (await balance(conn, tenant_id)).credit_nano_usd
            await books.serve(Usage(credit // 150 * 9 // 10, 0, 0), PAID_NS + DAY_NS)  # in use again, most of it
            with pytest.raises(CreditLineError, match="are free"):
                await pay(conn, note.invoice_id, "", now_ns=PAID_NS + DAY_NS)
            assert len(await payments_of(conn, note.invoice_id)) == 1
            assert (await check_ledger(conn)).ok

    asyncio.run(run())
