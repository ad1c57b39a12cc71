"""One tenant's page: its own figures only, every request once, never a secret."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update

from gateway.admin.tenant_page import REQUESTS_PER_PAGE, parse_cursor
from tenancy.keys import revoke_key
from tenancy.money import BIGINT_MAX
from tenancy.tables import account
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
    assert acme.secret_text.split("-")[2] not in text
    assert f"bk-{acme.secret_text.split('-')[1]}-…" in text
    assert "revoked 2026-11-23 12:00:00 UTC" in text
    assert "inference usage" in text
    assert "1 pending hold" in text
    assert globex.tenant_id not in text
    assert acme.tenant_id not in other
    rows = re.findall(r"<code>(req_[0-9a-f]{32})</code>", text)
    assert len(rows) == len(set(rows)) == 5, "four requests and one hold"


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
