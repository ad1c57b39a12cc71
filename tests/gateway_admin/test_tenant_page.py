"""One tenant's page: its own figures only, every request once, never a secret."""

import html
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, update

from audit.transparency.tables import outbox
from gateway.admin.tenant_page import REQUESTS_PER_PAGE, parse_cursor
from gateway.billing.bookkeeper import Bookkeeper
from gateway.clerk import Clerk
from tenancy.access.keys import revoke_key
from tenancy.accounts.budgets import set_budget
from tenancy.invoicing.parties import Buyer
from tenancy.money import BIGINT_MAX
from tenancy.tables import account, hold
from tenancy.usage.meter import Effort, Usage
from tests.gateway_admin.house import House
from tests.gateway_admin.reading import busy

pytestmark = pytest.mark.anyio


async def test_the_tenant_page(house: House) -> None:
    await busy(house)
    acme, globex = house.customers["acme"], house.customers["globex"]
    async with house.services.database.transaction() as conn:
        await revoke_key(conn, acme.key_id, now_ns=house.clock())
    async with house.visitor() as browser:
        text = (await browser.get(f"/admin/tenants/{acme.tenant_id}")).text
        other = (await browser.get(f"/admin/tenants/{globex.tenant_id}")).text
    assert "Agrees to the nano-USD" in text
    assert acme.secret_text not in text
    assert acme.secret_text.split("-", 2)[2] not in text
    assert f"bk-{acme.secret_text.split('-')[1]}-…" in text
    assert "revoked 2026-11-23 12:00:00 UTC" in text
    assert "inference usage" in text
    assert "1 pending hold" in text
    assert globex.tenant_id not in text
    assert acme.tenant_id not in other
    rows = re.findall(r"<code>(req_[0-9a-f]{32})</code>", text)
    assert len(rows) == len(set(rows)) == 5, "four requests and one hold"


async def test_the_engine_s_time_is_shown_where_it_was_measured(house: House) -> None:
    acme = await house.add_tenant("acme")
    for effort in (Effort(1_234_567_890, 0, 0, 0, 0), None):
        placed = await house.hold(acme, 10, 10)
        await house.settle(acme, placed, Usage(10, 0, 5), effort=effort)
    async with house.visitor() as browser:
        text = (await browser.get(f"/admin/tenants/{acme.tenant_id}")).text
    assert '<th scope="col" class="n">Engine, ms</th>' in text
    assert text.count('<td class="n">1,234.6</td>') == 1
    assert text.count('<td class="n">-</td>') == 1


async def test_budgets_are_shown_with_use_and_alert(house: House) -> None:
    acme = await house.add_tenant("acme")
    async with house.services.database.transaction() as conn:
        for scope_kind, scope_id, hard in (("tenant", acme.tenant_id, True), ("key", acme.key_id, False)):
            await set_budget(conn, scope_kind, scope_id, "day", hard=hard, limit_nano_usd=10**9, now_ns=house.clock())
    await house.serve(acme, 100, 0, 100)
    async with house.visitor() as browser:
        quiet = (await browser.get(f"/admin/tenants/{acme.tenant_id}")).text
        async with house.services.database.transaction() as conn:
            await set_budget(conn, "tenant", acme.tenant_id, "day", hard=True, limit_nano_usd=1, now_ns=house.clock())
        full = (await browser.get(f"/admin/tenants/{acme.tenant_id}")).text
    assert quiet.count("below 50 %") == 2
    assert f"<td>key {acme.key_id}</td><td>day</td><td>soft</td>" in quiet
    assert "<td>tenant</td><td>day</td><td>hard</td>" in full
    assert '<span class="tag" data-state="bad">100 % reached</span>' in full


async def test_credits_are_shown_in_the_order_in_which_they_are_used(house: House) -> None:
    acme = await house.add_tenant("acme")
    async with house.services.database.transaction() as conn:
        clerk, end = Clerk(conn, os.urandom, house.clock()), house.clock() + 10**9
        await clerk.grant_credit(acme.tenant_id, 5, transfer_id="trf_2", memo="x", kind="promotional", expires_ns=end)
    async with house.visitor() as browser:
        text = (await browser.get(f"/admin/tenants/{acme.tenant_id}")).text
    rows = re.findall(r"<td>(promotional|paid)</td>.*?<td>([^<]*)</td><td><code>([^<]*)</code>", text)
    assert rows[0] == ("promotional", "2026-11-23 12:00:01 UTC", "trf_2")
    assert [(kind, expires) for kind, expires, _ in rows[1:]] == [("paid", "never")]


async def test_invoices_are_shown_with_what_is_open(house: House) -> None:
    acme = await house.add_tenant("acme", currency="USD", credit_nano_usd=10**15)
    for _ in range(3):
        await house.serve(acme, 90_000, 0, 90_000)
    house.clock.advance(86_400)
    page = f"/admin/tenants/{acme.tenant_id}"

    async def row() -> list[str]:
        async with house.visitor() as browser:
            panel = (await browser.get(page)).text.partition('id="invoices"')[2].partition("</section>")[0]
        return [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", panel)]

    assert await row() == []
    async with house.services.database.transaction() as conn:
        keeper = Bookkeeper(conn, os.urandom, house.clock())
        party = {"name": "<b>Ltd", "address": "", "tax_id": ""}
        issuer = await keeper.set_issuer("BH", **party, payment_details="", payment_days=14)
        await keeper.set_buyer(Buyer(acme.tenant_id, issuer.issuer_id, "acme", "", "", 0, "on_account"))
        drafted = await keeper.draft(acme.tenant_id, None, house.clock() - 3_600 * 10**9)
    number, kind, *_, due, left, word, invoice_id = await row()
    assert (number, kind, due, left, word, invoice_id) == ("-", "invoice", "-", "-", "draft", drafted.invoice_id)
    async with house.services.database.transaction() as conn:
        keeper = Bookkeeper(conn, os.urandom, house.clock())
        due_minor = (await keeper.issue(drafted.invoice_id)).figures["due_minor"]
        assert due_minor > 1
        await keeper.pay(drafted.invoice_id, "", amount_minor=1)
    number, _, _, due_by, due, left, word, _ = await row()
    assert (number, due_by, word) == ("BH-000001", "8 December 2026", "issued")
    assert [int(text.replace(".", "")) for text in (due, left)] == [due_minor, due_minor - 1]
    house.clock.advance(15 * 86_400)
    assert (await row())[-2] == "overdue"
    async with house.services.database.transaction() as conn:
        await Bookkeeper(conn, os.urandom, house.clock()).pay(drafted.invoice_id, "")
    assert (await row())[-3:-1] == ["0.00", "paid"]


async def test_a_refund_is_shown_and_the_books_still_agree(house: House) -> None:
    acme = await house.add_tenant("acme")
    await house.serve(acme, 100, 0, 100)
    async with house.services.database.transaction() as conn:
        request_id = str(await conn.scalar(select(hold.c.request_id)))
        clerk = Clerk(conn, os.urandom, house.clock())
        for _ in range(2):  # a repeat changes and logs nothing
            await clerk.refund(request_id, 1, transfer_id="trf_1", reason="sorry")
            await clerk.grant_credit(acme.tenant_id, 5, transfer_id="trf_2", memo="x")
            await clerk.adjust_credit(acme.tenant_id, -5, transfer_id="trf_3", corrects_id="trf_2", reason="typo")
        kinds = (await conn.execute(select(outbox.c.kind).where(outbox.c.kind.like("credit.%")))).scalars().all()
        assert sorted(kinds) == ["credit.adjusted", "credit.granted", "credit.refunded"]
    async with house.visitor() as browser:
        text = (await browser.get(f"/admin/tenants/{acme.tenant_id}")).text
    assert "$0.000000001 of it refunded" in text
    assert "Agrees to the nano-USD" in text


async def test_a_ledger_that_does_not_agree_is_shown(house: House) -> None:
    acme = await house.add_tenant("acme")
    await house.serve(acme, 100, 0, 100)
    async with house.services.database.transaction() as conn:
        await conn.execute(update(account).where(account.c.kind == "revenue").values(balance_nano_usd=1))
    async with house.visitor() as browser:
        text = (await browser.get(f"/admin/tenants/{acme.tenant_id}")).text
    assert "Does not agree" in text
    assert "Agrees to the nano-USD" not in text


async def test_paging_shows_every_request_once(house: House) -> None:
    acme = await house.add_tenant("acme")
    number = REQUESTS_PER_PAGE + 3
    for i in range(number):
        await house.serve(acme, 1, 0, 1, ago_s=i // 3)  # several finish in the same nanosecond
    path, seen = f"/admin/tenants/{acme.tenant_id}", []
    async with house.visitor() as browser:
        pages = 0
        while True:
            text = (await browser.get(path)).text
            seen += re.findall(r"<code>(req_[0-9a-f]{32})</code>", text)
            pages += 1
            older = re.search(r'rel="next" href="([^"#]+)', text)
            if older is None:
                break
            path = html.unescape(older.group(1))
        assert "No older requests" not in text
        empty = (await browser.get(f"/admin/tenants/{acme.tenant_id}?before=1.x")).text
        assert "No older requests." in empty
    assert pages == 2
    assert len(seen) == len(set(seen)) == number


@given(st.text())
def test_any_cursor_is_read_or_ignored(text: str) -> None:
    cursor = parse_cursor(text)
    assert cursor is None or (0 <= cursor[0] <= BIGINT_MAX and cursor[1].isprintable())


async def test_unknown_tenants(house: House) -> None:
    async with house.visitor() as browser:
        for tenant_id in ("ten_nobody", "%00", "%2e%2e", "x" * 3000, "%F0%9F%92%A9"):
            assert (await browser.get(f"/admin/tenants/{tenant_id}")).status_code == 404
