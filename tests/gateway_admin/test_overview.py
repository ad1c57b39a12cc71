"""The overview shows the ledger's figures, and the page and its live updates say the same."""

import asyncio
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.transparency.keyring import load_keyring
from audit.transparency.log import sequence
from gateway.admin.overview import PERIODS, Money, add_up, empty_minutes
from gateway.admin.overview import TenantFigures as Figures
from tenancy.accounts.ledger import balance
from tenancy.accounts.ledger_check import check_ledger
from tenancy.money import BIGINT_MAX
from tenancy.quotas.limits import ScopeLimits, set_limits
from tenancy.quotas.quota import Lease
from tenancy.usage.meter import usage_by_tenant
from tests.gateway_admin.house import NOON_NS, House, build_house, log_in
from tests.gateway_admin.reading import PageText, busy, fields_of, nano_usd
from tests.servers import PostgresServer

pytestmark = pytest.mark.anyio


async def test_figures_equal_the_ledger_and_the_total_equals_the_sum(house: House) -> None:
    await busy(house)
    async with house.visitor() as browser:
        fields = await fields_of(browser)
    columns = ("requests", "prompt", "cached", "completion", "billed", "held", "credit")
    sums = dict.fromkeys(columns, 0)
    async with house.services.database.read() as conn:
        assert (await check_ledger(conn)).ok
        usage = {u.tenant_id: u for u in await usage_by_tenant(conn, 0, BIGINT_MAX)}
        for name, customer in house.customers.items():
            id_ = customer.tenant_id
            kept = await balance(conn, id_)
            u = usage.get(id_)
            expected = {
                "requests": u.num_requests if u else 0,
                "prompt": u.num_prompt_tokens if u else 0,
                "cached": u.num_cached_tokens if u else 0,
                "completion": u.num_completion_tokens if u else 0,
                "billed": kept.captured_nano_usd,
                "held": kept.held_nano_usd,
                "credit": kept.credit_nano_usd,
            }
            for column in columns:
                shown = fields[f"{id_}.{column}"]
                value = nano_usd(shown) if shown.startswith("$") else int(shown.replace(",", ""))
                assert value == expected[column], (name, column)
                sums[column] += value
    for column in columns:
        shown = fields[f"total.{column}"]
        assert (nano_usd(shown) if shown.startswith("$") else int(shown.replace(",", ""))) == sums[column], column
    assert sums["requests"] == 6
    assert sums["held"] > 0


figures = st.builds(
    Figures,
    tenant_id=st.just("ten_x"),
    name=st.just("x"),
    status=st.just("active"),
    num_requests=st.integers(0, BIGINT_MAX),
    num_prompt_tokens=st.integers(0, BIGINT_MAX),
    num_cached_tokens=st.integers(0, BIGINT_MAX),
    num_completion_tokens=st.integers(0, BIGINT_MAX),
    money=st.builds(
        lambda currency, *amounts: {currency: Money(*amounts)},
        st.sampled_from(["USD", "EUR", "JPY"]),
        *[st.integers(0, BIGINT_MAX)] * 3,
    ),
    num_blocks=st.integers(0, 10**6),
    limits=st.just({}),
    minutes=st.just(empty_minutes(NOON_NS)),
)


@given(st.lists(figures, max_size=5))
def test_the_totals_row_is_the_exact_sum(rows: list[Figures]) -> None:
    total = add_up(rows, NOON_NS)
    for name in ("num_requests", "num_cached_tokens", "num_blocks"):
        assert getattr(total, name) == sum(getattr(row, name) for row in rows)
    assert list(total.money) == sorted({currency for row in rows for currency in row.money})
    for currency, money in total.money.items():
        mine = [row.money[currency] for row in rows if currency in row.money]
        for name in ("billed", "held", "credit"):
            assert getattr(money, name) == sum(getattr(one, name) for one in mine)


async def test_money_is_added_up_and_named_in_each_currency(house: House) -> None:
    """Some in dollars, two in euros: all are in the totals, nothing is added across, no euro reads as a dollar."""
    await busy(house)
    euros = await house.add_tenant("euros", credit_nano_usd=7 * 10**9, currency="EUR")
    await house.add_tenant("more euros", credit_nano_usd=10**9 + 5, currency="EUR")
    async with house.visitor() as browser:
        page = (await browser.get("/admin?period=all")).text
        fields = PageText(page).fields
        tenant_page = (await browser.get(f"/admin/tenants/{euros.tenant_id}")).text
    assert "Money, EUR and USD" in page
    assert fields[f"{euros.tenant_id}.credit"].rstrip("\u2007") == "EUR 7.00"
    total_eur, total_usd = (line.rstrip("\u2007") for line in fields["total.credit"].split("\n"))
    assert total_eur == "EUR 8.000000005"
    dollars = [fields[f"{one.tenant_id}.credit"] for name, one in house.customers.items() if "euros" not in name]
    assert nano_usd(total_usd) == sum(map(nano_usd, dollars)) > 0
    assert "EUR 7.00" in tenant_page
    assert "Agrees to the nano-EUR" in tenant_page
    assert "$" not in tenant_page


async def test_the_page_and_the_live_update_say_the_same(house: House) -> None:
    await busy(house)
    await house.heartbeat(ago_s=3)
    async with house.visitor() as browser:
        page = PageText((await browser.get("/admin?period=all")).text)
        update = (await browser.get("/admin/overview.json?period=all")).json()
    changing = {"stores.database", "stores.valkey"}  # how fast they answered
    assert page.fields.keys() == update["fields"].keys() - {"period"} | {"period"}
    for name in page.fields.keys() - changing:
        assert page.fields[name] == update["fields"][name]
    attributes = [a for _, a in page.tags]
    assert {a["data-state-of"]: a["data-state"] for a in attributes if "data-state-of" in a} == update["states"]
    meters = {a["data-meter"]: int(str(a["width"])) for a in attributes if "data-meter" in a}
    assert meters == update["meters"] != {}
    paths = {(a["data-chart"], a["data-kind"]): a["d"] for a in attributes if "data-chart" in a}
    assert paths == {(key, kind): d for key, kinds in update["charts"].items() for kind, d in kinds.items()}
    assert [a["data-layout"] for a in attributes if "data-layout" in a] == [update["layout"]]


async def test_periods(house: House) -> None:
    acme = await house.add_tenant("acme")
    for ago_s in (10, 2 * 3600, 20 * 3600, 23 * 86_400):  # now is the 23rd, 12:00
        await house.serve(acme, 10, 0, 1, ago_s=ago_s)
    async with house.visitor() as browser:
        counted = {p.name: (await fields_of(browser, p.name))[f"{acme.tenant_id}.requests"] for p in PERIODS}
        assert counted == {"hour": "1", "day": "2", "month": "3", "all": "4"}
        assert (await fields_of(browser, "month"))["period"] == "since 2026-11-01 00:00:00 UTC"
        page = (await browser.get("/admin?period=day")).text
        assert '<a href="/admin?period=day" aria-current="page">Today</a>' in page
        assert (await browser.get("/admin?period=%3Cscript%3E")).status_code == 400


async def test_limits_show_what_valkey_counts(house: House) -> None:
    acme = await house.add_tenant("acme")
    limits = {"requests_per_minute": 60, "tokens_per_minute": 10_000, "concurrency_max": 4}
    async with house.services.database.transaction() as conn:
        await set_limits(conn, "tenant", acme.tenant_id, **limits, now_ns=house.clock())
    scope = ScopeLimits(acme.tenant_id, **limits, organisation_id=acme.organisation_id)
    for i in range(3):
        lease = await house.services.quota.acquire(
            [scope], tenant_id=acme.tenant_id, lease_id=f"req_{i}", num_tokens=2_000, lease_ttl_ms=60_000
        )
        assert isinstance(lease, Lease)
    async with house.visitor() as browser:
        update = (await browser.get("/admin/overview.json")).json()
    used = update["fields"][f"{acme.tenant_id}.limit_tokens"]
    assert re.fullmatch(r"(5,9\d\d|6,000) of 10,000", used), "three times 2,000, less what has flowed back since"
    assert update["meters"][f"{acme.tenant_id}.limit_tokens"] in (59, 60)
    assert update["fields"][f"{acme.tenant_id}.limit_requests"] in ("3 of 60", "2 of 60")
    assert update["fields"][f"{acme.tenant_id}.limit_concurrency"] == "3 of 4"
    assert update["meters"][f"{acme.tenant_id}.limit_concurrency"] == 75


async def test_blocks_and_the_worker(house: House) -> None:
    acme = await house.add_tenant("acme")
    await house.log(
        "worker.started",
        {"epoch": "e7c1", "model_id": "m", "model_digest": "d", "isolation": "strict", "kernels": "torch"},
        ago_s=125,
    )
    await house.worker.report({acme.tenant_id: 37, "canary": 3})
    async with house.visitor() as browser:
        for _ in range(100):
            fields = await fields_of(browser)
            if fields[f"{acme.tenant_id}.blocks"] == "37":
                break
        assert fields[f"{acme.tenant_id}.blocks"] == fields["total.blocks"] == "37"
        assert fields["worker.blocks"] == "40 of 512 KV blocks in use, 3 by no tenant"
        assert fields["worker.uptime"] == "Epoch e7c1, up 2 min 5 s, 0 restarts"
        await house.worker.stop()
        house.services.engine.detach()
        fields = await fields_of(browser)
        assert fields["worker.word"] == "Lost"
        assert fields["audit.word"] == "Blind: no worker to audit"
        assert fields[f"{acme.tenant_id}.blocks"] == "0"


async def test_the_heartbeat_is_found_before_and_after_it_is_sequenced(house: House, tmp_path: Path) -> None:
    async with house.visitor() as browser:
        assert (await fields_of(browser))["audit.word"] == "Blind: no recent heartbeat"
        await house.heartbeat(ago_s=4)
        before = await fields_of(browser)
        keyring = load_keyring(tmp_path / "keys", origin="test.local/log", entropy=os.urandom)
        assert before["log.word"] == "Unsigned"
        async with house.services.database.transaction() as conn:
            assert await sequence(conn, signer=keyring, origin="test.local/log", now_ns=house.clock()) is not None
        after = await fields_of(browser)
        assert before["audit.word"] == after["audit.word"] == "Awake"
        assert before["audit.heartbeat"] == after["audit.heartbeat"]
        assert after["audit.heartbeat"] == "Last heartbeat 4 s ago, 11:59:56 UTC"
        assert (after["log.word"], after["log.size"]) == ("Signed", "2 leaves under the last checkpoint")
        await house.heartbeat(num_violations=1)
        assert (await fields_of(browser))["audit.word"] == "Isolation was violated"


async def test_without_tenants_the_page_says_what_to_do(house: House) -> None:
    async with house.visitor() as browser:
        page = (await browser.get("/admin")).text
    assert "There are no tenants yet." in page
    assert "<table" not in page


async def test_the_same_figures_on_postgresql(
    tmp_path: Path, valkey_socket: Path, postgres_server: PostgresServer, anyio_backend: str
) -> None:
    url = await asyncio.to_thread(postgres_server.new_served_database)
    async with build_house(tmp_path, valkey_socket, database_url=url) as house, house.visitor() as browser:
        await busy(house)
        await house.heartbeat()
        await house.services.standing.look()
        fields = await fields_of(browser)
        assert (fields["total.requests"], fields["total.prompt"]) == ("6", "3,057")
        assert (fields["stores.word"], fields["stores.append_only"]) == ("Both answer", "Append-only is held by rights")
        assert fields["stores.database"].startswith("PostgreSQL answered in ")
        acme = house.customers["acme"].tenant_id
        assert "most in the minute from" in fields[f"{acme}.chart"]
        page = (await browser.get(f"/admin/tenants/{acme}?before={house.clock()}.req_x")).text
        assert "Agrees to the nano-USD" in page
        assert (await browser.get("/admin/tenants/%00")).status_code == 404
        assert (await browser.get(f"/admin/tenants/{acme}?before=1.%00")).status_code == 200
        assert (await log_in(browser, "\0", "x")).status_code == 401
