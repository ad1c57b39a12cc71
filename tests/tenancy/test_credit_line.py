"""Post-paid tenants against a model: never above the limit, in whatever order is used, billed, paid, refunded."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from tenancy.accounts import credit_line
from tenancy.accounts.corrections import CorrectionError, adjust, refund
from tenancy.accounts.credit_line import CreditLine, CreditLineError, Due, get_line, set_limit
from tenancy.accounts.ledger import InsufficientCredit, balance, place_hold
from tenancy.accounts.ledger_check import check_ledger
from tenancy.accounts.posting import lock_all_accounts
from tenancy.invoicing.endings import pay, void
from tenancy.invoicing.invoices import draft_credit_note, draft_invoice, issue
from tenancy.invoicing.periods import DAY_NS
from tenancy.usage.meter import Usage
from tests.tenancy.books import MONTH_NS, Books, open_books
from tests.tenancy.conftest import opened
from tests.tenancy.test_ledger import LedgerMachine
from tests.tenancy.world import SECOND, T0, counting_entropy

LIMIT = 10**12
USED = Usage(1_000_000, 0, 100_000)


@dataclass
class Bill:
    """An invoice in the model: what its requests drew of the line, what it made due, and what came back."""

    drawn: int
    due: int
    paid: int = 0
    freed: int = 0
    state: str = "issued"


class PostPaidMachine(LedgerMachine):
    """The ledger's machine with a credit line for one of its tenants, which is billed and pays."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = self.paid_back = self.to_line = 0
        self.bills: dict[str, Bill] = {}
        self.num = 0

    @initialize(limit=st.integers(1, 150))
    def post_paid(self, limit: int) -> None:
        self.set_limit(limit)

    @rule(limit=st.integers(0, 150))
    def set_limit(self, limit: int) -> None:
        self.num += 1
        change, model = limit - self.limit, self.models["acme"]
        call: dict[str, Any] = {"transfer_id": f"limit_{self.num}", "now_ns": self.now_ns}
        if change < -min(model.credit, self.line_left()):
            with pytest.raises(CreditLineError):
                self.run(set_limit, self.acme, limit, **call)
            return
        made = self.run(set_limit, self.acme, limit, **call)
        assert (made is None) == (change == 0)
        model.credit += change
        self.limit = limit

    @rule(amount=st.integers(0, 60))
    def bill(self, amount: int) -> None:
        """Of what was drawn of the line and not billed, so much: plus tax, less what minor units leave out."""
        unbilled = self.drawn() - sum(bill.drawn - bill.freed for bill in self.bills.values() if bill.state == "issued")
        amount = max(0, min(amount, unbilled))
        self.num += 1
        self.bills[f"inv_{self.num}"] = Bill(amount, amount + 12)
        due = Due(due_nano=amount + 12, line_nano=amount, paid_credit_nano=0, tax_nano=10)
        self.run(credit_line.invoiced, self.acme, f"inv_{self.num}", due, self.now_ns)

    @rule(data=st.data(), part=st.integers(1, 100))
    def pay_bill(self, data: st.DataObject, part: int) -> None:
        """Some percent of what is open, or all of it: what comes back is the billed part's share, to the nano-unit."""
        name = self.an_issued(data, paid_in_part=True)
        if not name:
            return
        bill = self.bills[name]
        amount = max(1, (bill.due - bill.paid) * part // 100)
        self.num += 1
        how: dict[str, Any] = {"payment_id": f"pay_{self.num}", "reference": "", "now_ns": self.now_ns}
        with pytest.raises(AssertionError, match="not within what is open"):
            self.run(credit_line.paid, self.acme, name, bill.due - bill.paid + 1, **how)
        self.run(credit_line.paid, self.acme, name, amount, **how)
        bill.paid += amount
        freed = floor(Fraction(bill.drawn * bill.paid, bill.due))
        self.models["acme"].credit += freed - bill.freed
        self.paid_back += freed - bill.freed
        bill.freed = freed
        if bill.paid == bill.due:
            assert bill.freed == bill.drawn
            bill.state = "paid"

    @rule(data=st.data())
    def void_bill(self, data: st.DataObject) -> None:
        name = self.an_issued(data, paid_in_part=False)
        if name:
            self.run(credit_line.voided, self.acme, name, "", self.now_ns)
            self.bills[name].state = "void"

    def an_issued(self, data: st.DataObject, *, paid_in_part: bool) -> str:
        issued = [
            name for name, bill in self.bills.items() if bill.state == "issued" and (paid_in_part or not bill.paid)
        ]
        return data.draw(st.sampled_from(sorted(issued))) if issued else ""

    @property
    def acme(self) -> str:
        return self.tenants["acme"].tenant_id

    def granted(self) -> int:
        return sum(amount for name, amount in self.transfers.items() if name.startswith("acme"))

    def line_left(self) -> int:
        line: CreditLine | None = self.run(get_line, self.acme)
        return 0 if line is None else line.left_nano_usd

    def drawn(self) -> int:
        return self.limit - self.line_left()

    @invariant()
    def never_above_the_limit(self) -> None:
        line: CreditLine = self.run(get_line, self.acme)
        if line is None:
            return
        model = self.models["acme"]
        own = self.granted()
        # Whatever the order in which credit and line were used, together they cover what was billed and is held.
        assert model.captured + model.held <= own + self.limit + self.paid_back
        own_left = model.credit + model.held - line.left_nano_usd
        assert 0 <= own_left <= own
        assert line.drawn_nano_usd + max(0, model.held - own_left) <= line.limit_nano_usd == self.limit
        assert line.drawn_nano_usd == model.captured - (own - own_left) - self.paid_back
        issued = [bill for bill in self.bills.values() if bill.state == "issued"]
        assert line.receivable_nano_usd == sum(bill.due - bill.paid for bill in issued)

    async def compare(self, conn: Any) -> None:
        for name, model in self.models.items():
            now = await balance(conn, self.tenants[name].tenant_id)
            assert (now.credit_nano_usd, now.held_nano_usd) == (model.credit, model.held)
        check = await check_ledger(conn)
        assert check.ok, check


TestPostPaidMachine = PostPaidMachine.TestCase
if settings.get_current_profile_name() == "quick":
    TestPostPaidMachine.settings = settings(max_examples=20, stateful_step_count=30)


async def post_paid_books(conn: Any, **more: Any) -> Books:
    """A tenant that has only its line."""
    books = await open_books(conn, counting_entropy(), **more)
    credit = (await balance(conn, books.who.tenant_id)).credit_nano_usd
    await books.adjust(-credit, MONTH_NS, corrects_id="grant_acme")
    await set_limit(conn, books.who.tenant_id, LIMIT, transfer_id="limit", now_ns=MONTH_NS)
    return books


def test_a_month_on_account_is_billed_paid_and_free_again(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            books = await post_paid_books(conn, terms="prepaid", tax_rate_bp=1_900)
            tenant_id = books.who.tenant_id
            request_id = await books.serve(USED, MONTH_NS + SECOND)
            await books.serve(Usage(7, 0, 3), MONTH_NS + SECOND)  # a fraction of a cent: rounding
            drawn = sum(books.charged.values())
            assert await get_line(conn, tenant_id) == CreditLine(tenant_id, LIMIT, LIMIT - drawn, 0)

            invoice, document = await books.bill(MONTH_NS, MONTH_NS + DAY_NS)
            figures = document.figures
            due_nano = figures["due_minor"] * 10**7
            assert figures["due_minor"] == figures["net_minor"] + figures["tax_minor"] > figures["net_minor"] > 0
            assert await get_line(conn, tenant_id) == CreditLine(tenant_id, LIMIT, LIMIT - drawn, due_nano)
            accounts = await lock_all_accounts(conn, tenant_id)
            assert accounts["tax"] == figures["tax_minor"] * 10**7
            assert accounts["line"] == drawn - LIMIT
            assert abs(accounts["rounding"]) <= 5 * 10**6

            for _ in range(2):  # the second changes nothing
                await pay(conn, invoice.invoice_id, "by bank", now_ns=MONTH_NS + 3 * DAY_NS)
            assert await get_line(conn, tenant_id) == CreditLine(tenant_id, LIMIT, LIMIT, 0)
            accounts = await lock_all_accounts(conn, tenant_id)
            grants = -accounts["funding"]
            assert grants == due_nano  # only what was paid ever came in
            assert (accounts["line"], accounts["credit"]) == (-LIMIT, LIMIT)

            # A refund after that goes to the line; its credit note is due to the tenant, and paid out once.
            await books.refund(request_id, 3 * 10**7, MONTH_NS + 4 * DAY_NS)
            note = await draft_credit_note(
                conn, invoice.invoice_id, entropy=books.entropy, now_ns=MONTH_NS + 5 * DAY_NS
            )
            issued = (await issue(conn, note.invoice_id, now_ns=MONTH_NS + 5 * DAY_NS)).figures
            line = await get_line(conn, tenant_id)
            assert line is not None
            assert line.left_nano_usd == LIMIT + 3 * 10**7
            assert line.receivable_nano_usd == issued["due_minor"] * 10**7 < 0
            await pay(conn, note.invoice_id, "sent back", now_ns=MONTH_NS + 6 * DAY_NS)
            assert await get_line(conn, tenant_id) == CreditLine(tenant_id, LIMIT, LIMIT, 0)
            assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_a_void_invoice_is_not_due_and_its_period_is_billed_again(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            books = await post_paid_books(conn)
            tenant_id = books.who.tenant_id
            await books.serve(USED, MONTH_NS + SECOND)
            before = await lock_all_accounts(conn, tenant_id)
            invoice, first = await books.bill(MONTH_NS, MONTH_NS + DAY_NS)
            await void(conn, invoice.invoice_id, "wrong address", now_ns=MONTH_NS + 3 * DAY_NS)
            assert await lock_all_accounts(conn, tenant_id) == before
            _, second = await books.bill(MONTH_NS, MONTH_NS + DAY_NS)
            assert second.figures["due_minor"] == first.figures["due_minor"]
            line = await get_line(conn, tenant_id)
            assert line is not None
            assert line.receivable_nano_usd == second.figures["due_minor"] * 10**7
            assert (await check_ledger(conn)).ok

    asyncio.run(run())


@pytest.mark.parametrize("terms", ["prepaid", "on_account"])
def test_own_credit_goes_first_and_is_due_as_the_terms_say(database_url: str, terms: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            books = await open_books(conn, counting_entropy(), terms=terms, tax_rate_bp=0)  # type: ignore[arg-type]
            tenant_id = books.who.tenant_id
            credit = (await balance(conn, tenant_id)).credit_nano_usd
            await books.adjust(10**8 - credit, MONTH_NS, corrects_id="grant_acme")  # ten cents are left
            await set_limit(conn, tenant_id, LIMIT, transfer_id="limit", now_ns=MONTH_NS)
            with pytest.raises(CorrectionError):  # the line is no credit that could be taken back
                await adjust(conn, tenant_id, -(10**8 + 1), transfer_id="take", reason="", now_ns=MONTH_NS)
            await books.serve(USED, MONTH_NS + SECOND)
            charged = sum(books.charged.values())
            line = await get_line(conn, tenant_id)
            assert line is not None
            assert line.drawn_nano_usd == charged - 10**8 > 0
            _, document = await books.bill(MONTH_NS, MONTH_NS + DAY_NS)
            due = charged if terms == "on_account" else charged - 10**8
            assert document.figures["due_minor"] * 10**7 == due
            accounts = await lock_all_accounts(conn, tenant_id)
            assert accounts["receivable"] == -due
            assert accounts["funding"] == (0 if terms == "on_account" else -(10**8))
            assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_a_refund_goes_where_the_request_took_it(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            books = await open_books(conn, counting_entropy())
            tenant_id = books.who.tenant_id
            credit = (await balance(conn, tenant_id)).credit_nano_usd
            await books.adjust(10**8 - credit, MONTH_NS, corrects_id="grant_acme")
            await set_limit(conn, tenant_id, LIMIT, transfer_id="limit", now_ns=MONTH_NS)
            request_id = await books.serve(USED, MONTH_NS + SECOND)
            drawn = books.charged[request_id] - 10**8
            for number, amount in enumerate((drawn - 5, 10, 10**8 - 5)):
                call = {"transfer_id": f"back_{number}", "reason": "", "now_ns": MONTH_NS + 2 * SECOND}
                await refund(conn, request_id, amount, **call)
                line = await get_line(conn, tenant_id)
                assert line is not None
                assert line.drawn_nano_usd == max(0, 5 - 10 * number)
            assert (await balance(conn, tenant_id)).credit_nano_usd == LIMIT + 10**8
            assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_holds_at_once_stay_below_the_limit(postgres_url: str) -> None:
    """Forty holds of 100 against a line of 1000, while the limit is lowered and raised: no deadlock, never above."""

    async def run() -> None:
        async with opened(postgres_url) as database:
            async with database.transaction() as conn:
                books = await open_books(conn, counting_entropy())
                tenant_id, price_id = books.who.tenant_id, books.who.price_id
                credit = (await balance(conn, tenant_id)).credit_nano_usd
                await books.adjust(-credit, MONTH_NS, corrects_id="grant_acme")
                await set_limit(conn, tenant_id, 1_000, transfer_id="limit", now_ns=MONTH_NS)

            async def hold(number: int) -> bool:
                async with database.transaction() as conn:
                    made = await place_hold(
                        conn,
                        hold_id=f"hold_{number}",
                        tenant_id=tenant_id,
                        request_id=f"req_{number}",
                        price_id=price_id,
                        amount_nano_usd=100,
                        expires_ns=MONTH_NS + 60 * SECOND,
                        now_ns=MONTH_NS,
                    )
                    return not isinstance(made, InsufficientCredit)

            async def limit(number: int) -> None:
                with suppress(CreditLineError):
                    async with database.transaction() as conn:
                        changed = 1_000 + 100 * (number % 3 - 2)
                        await set_limit(conn, tenant_id, changed, transfer_id=f"limit_{number}", now_ns=T0)

            await asyncio.gather(*(step(number) for number in range(20) for step in (hold, limit, hold)))
            async with database.transaction() as conn:
                line, now = await get_line(conn, tenant_id), await balance(conn, tenant_id)
                assert line is not None
                assert now.held_nano_usd + now.credit_nano_usd == line.limit_nano_usd
                assert now.held_nano_usd >= 800
                assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_a_draft_makes_nothing_due(sqlite_url: str) -> None:
    """Draft, not issued: nothing is due before a document says so."""

    async def run() -> None:
        async with opened(sqlite_url) as database, database.transaction() as conn:
            books = await post_paid_books(conn)
            await books.serve(USED, MONTH_NS + SECOND)
            await draft_invoice(
                conn,
                books.who.tenant_id,
                since_ns=MONTH_NS,
                until_ns=MONTH_NS + DAY_NS,
                entropy=books.entropy,
                now_ns=MONTH_NS + DAY_NS,
            )
            line = await get_line(conn, books.who.tenant_id)
            assert line is not None
            assert line.receivable_nano_usd == 0

    asyncio.run(run())
