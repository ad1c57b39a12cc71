"""What the pages show: the ledger's figures, to nobody without a session, whatever a tenant is called."""

import html
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import update
from starlette.routing import BaseRoute, Mount, Route

from audit.keyring import load_keyring
from audit.log import sequence
from gateway.admin import view as view_module
from gateway.admin.errors import ErrorPages
from gateway.admin.overview import PERIODS, add_up, empty_minutes
from gateway.admin.overview import TenantFigures as Figures
from gateway.admin.render import Pages
from gateway.admin.routes import PUBLIC, AdminSite, is_public
from gateway.admin.security import CONTENT_SECURITY_POLICY, HEADERS
from gateway.admin.sessions import SessionStore
from gateway.admin.tenant_page import REQUESTS_PER_PAGE, parse_cursor
from gateway.database import DatabaseUnavailableError
from tenancy.keys import revoke_key
from tenancy.ledger import balance
from tenancy.ledger_check import check_ledger
from tenancy.limits import ScopeLimits, set_limits
from tenancy.meter import usage_by_tenant
from tenancy.money import BIGINT_MAX, NANO_PER_USD
from tenancy.quota import Lease
from tenancy.tables import account, tenant
from tests.gateway_admin.house import NOON_NS, House

pytestmark = pytest.mark.anyio

MONEY = re.compile(r"(-?)\$([\d,]+)\.(\d{2,9})")


class PageText(HTMLParser):
    """data-field -> text, and every tag name with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs).get("data-field")
        if self._open is not None:
            self.fields[self._open] = ""

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.fields[self._open] += data


def nano_usd(text: str) -> int:
    match = MONEY.fullmatch(text.rstrip("\u2007"))
    assert match is not None, text
    sign, whole, fraction = match.groups()
    value = int(whole.replace(",", "")) * NANO_PER_USD + int(fraction.ljust(9, "0"))
    return -value if sign else value


async def fields_of(browser: httpx.AsyncClient, period: str = "all") -> dict[str, str]:
    answer = await browser.get(f"/admin/overview.json?period={period}")
    assert answer.status_code == 200
    fields: dict[str, str] = answer.json()["fields"]
    return fields


async def busy(house: House) -> None:
    """Two tenants at work and one that never came."""
    acme, globex = await house.add_tenant("acme"), await house.add_tenant("globex")
    await house.add_tenant("initech", credit_nano_usd=0)
    async with house.services.database.transaction() as conn:
        await set_limits(conn, "tenant", acme.tenant_id, requests_per_minute=60, now_ns=house.clock())
    for ago_s, counts in enumerate(((120, 0, 33), (120, 96, 61), (7, 0, 1), (1999, 512, 48))):
        await house.serve(acme, *counts, ago_s=ago_s * 120)
    await house.serve(globex, 11, 0, 5)
    await house.serve(globex, 800, 0, 500, ago_s=7200)
    await house.hold(acme, 300, 256)
    await house.hold(globex, 20, 20)


# Closed by default


def paths_of(routes: list[BaseRoute]) -> list[str]:
    found = []
    for route in routes:
        assert isinstance(route, Route | Mount)
        found.append(re.sub(r"\{[^}]+\}", "x", route.path))
    return found


async def test_no_page_without_a_session(house: House) -> None:
    """Walks the very routes that are served: a new one is closed until it is named in PUBLIC."""
    site = AdminSite(house.services, SessionStore(house.services.redis, b"", now_ns=house.clock, entropy=os.urandom))
    paths = [path for path in paths_of(site.routes()) if not is_public(path + "/")]
    assert len([path for path in paths if not is_public(path)]) >= 4
    async with house.browser() as browser:
        for path in [*paths, "/admin/", "/admin/no-such-page", "/admin/tenants/../overview.json", "/admin//login"]:
            if is_public(path):
                continue
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
                answer = await browser.request(method, path)
                assert answer.status_code in (303, 401), (method, path)
                assert answer.headers.get("location", "/admin/login") == "/admin/login"
                assert "acme" not in answer.text


async def test_what_is_public_is_the_log_in_and_the_static_files_only() -> None:
    assert PUBLIC == ("/admin/login", "/admin/static/")
    for path in (
        "/admin",
        "/admin/login/",
        "/admin/login/x",
        "/admin/static",
        "/admin/staticx",
        "/admin/x/admin/static/",
    ):
        assert not is_public(path)


async def test_every_answer_has_the_headers(house: House) -> None:
    await busy(house)
    async with house.visitor() as browser:
        answers = [
            await browser.request(method, path)
            for method, path in (
                ("GET", "/admin"),
                ("GET", "/admin/"),
                ("GET", "/admin/overview.json"),
                ("GET", "/admin?period=never"),
                ("GET", "/admin/login"),
                ("POST", "/admin/login"),
                ("DELETE", "/admin"),
                ("GET", "/admin/static/admin.css"),
                ("GET", "/admin/static/admin.js"),
                ("GET", "/admin/static/nothing.js"),
                ("GET", "/admin/static/../admin/x"),
                ("GET", "/admin/nowhere"),
                ("GET", f"/admin/tenants/{house.customers['acme'].tenant_id}"),
                ("GET", "/admin/tenants/ten_nobody"),
                ("GET", "/admin/tenants/%00"),
            )
        ]
    assert {a.status_code for a in answers} == {200, 303, 400, 404, 405, 415}
    for answer in answers:
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        is_static = "/admin/static/" in str(answer.url)
        assert answer.headers["cache-control"] == ("no-cache" if is_static else "no-store")
        assert "strict-transport-security" not in answer.headers
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none'; script-src 'self'; style-src 'self'")


async def test_hsts_only_where_it_binds_nobody_else(house: House) -> None:
    async with house.browser() as browser:
        answer = await browser.get("/admin/login", headers={"host": "bulkhead.example"})
        assert answer.headers["strict-transport-security"] == "max-age=63072000"


async def test_nothing_inline_and_nothing_from_elsewhere(house: House) -> None:
    await busy(house)
    async with house.visitor() as browser:
        for path in ("/admin", f"/admin/tenants/{house.customers['acme'].tenant_id}", "/admin/nowhere"):
            for tag, attributes in PageText((await browser.get(path)).text).tags:
                assert tag not in ("style", "base", "iframe")
                assert "style" not in attributes
                assert not any(name.startswith("on") for name in attributes)
                if tag == "script":
                    assert attributes == {"type": "module", "src": "/admin/static/admin.js"}
                for name in ("src", "href", "action"):
                    assert (attributes.get(name) or "/admin").startswith(("/admin", "#"))


# Figures


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
    billed_nano_usd=st.integers(0, BIGINT_MAX),
    held_nano_usd=st.integers(0, BIGINT_MAX),
    credit_nano_usd=st.integers(0, BIGINT_MAX),
    num_blocks=st.integers(0, 10**6),
    limits=st.just({}),
    minutes=st.just(empty_minutes(NOON_NS)),
)


@given(st.lists(figures, max_size=5))
def test_the_totals_row_is_the_exact_sum(rows: list[Figures]) -> None:
    total = add_up(rows, NOON_NS)
    for name in (
        "num_requests",
        "num_cached_tokens",
        "billed_nano_usd",
        "held_nano_usd",
        "credit_nano_usd",
        "num_blocks",
    ):
        assert getattr(total, name) == sum(getattr(row, name) for row in rows)


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
    scope = ScopeLimits(acme.tenant_id, *limits.values(), organisation_id=acme.organisation_id)
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


# Names


@given(name=st.text(max_size=100), status=st.sampled_from(["active", "suspended"]))
def test_a_tenant_may_be_called_anything(name: str, status: str) -> None:
    overview_page, title = render_overview(name, status)
    parsed = PageText(overview_page)
    assert [tag for tag, _ in parsed.tags] == TAGS[status], "no name adds, removes or changes an element"
    assert (
        html.escape(name.replace("\r\n", "\n")).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in overview_page
    )
    assert parsed.fields["ten_1.chart"].startswith(title)


def render_overview(name: str, status: str) -> tuple[str, str]:
    from gateway.admin import chart, health
    from gateway.admin.limits import LimitUse
    from gateway.admin.overview import Overview

    use = {key: LimitUse(None, None) for key in ("requests", "tokens", "concurrency")}
    row = Figures("ten_1", name, status, 0, 0, 0, 0, 0, 0, 0, 0, use, empty_minutes(NOON_NS))
    lines = dict.fromkeys(
        (
            "heartbeat",
            "violations",
            "checked",
            "self_test",
            "isolation",
            "uptime",
            "model",
            "kernels",
            "blocks",
            "size",
            "signed",
            "lag",
            "database",
            "valkey",
        ),
        name,
    )
    facts = {key: health.Fact("bad", name, lines) for key in ("audit", "worker", "log", "stores")}
    overview = Overview(NOON_NS, PERIODS[0], 0, (row,), add_up([row], NOON_NS), facts)
    text = Pages().text(
        "overview.html",
        session=None,
        view=view_module.overview_view(overview),
        periods={period.name: period.label for period in PERIODS},
        labels=chart.LABELS,
    )
    return text, name.replace("\r\n", "\n") + ": no tokens"


TAGS = {
    status: [tag for tag, _ in PageText(render_overview("acme", status)[0]).tags] for status in ("active", "suspended")
}


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "'\"><img src=x onerror=alert(1)>", "&amp;<!--", "{{ 7*7 }}", "𝕏 شركة"]
)
async def test_hostile_names_on_both_pages(house: House, name: str) -> None:
    customer = await house.add_tenant("acme")
    async with house.services.database.transaction() as conn:
        await conn.execute(update(tenant).values(name=name))
    async with house.visitor() as browser:
        for path in ("/admin", f"/admin/tenants/{customer.tenant_id}"):
            text = (await browser.get(path)).text
            assert html.unescape(text).count(name) >= 2
            assert name not in text or not set(name) & set("<>&'\"")
            assert "49" not in PageText(text).fields.get(f"{customer.tenant_id}.chart", "")
            scripts = [a for tag, a in PageText(text).tags if tag == "script"]
            assert all(a == {"type": "module", "src": "/admin/static/admin.js"} for a in scripts)
            assert not [a for tag, a in PageText(text).tags if "onerror" in a]


# One tenant


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


@pytest.mark.parametrize("tenant_id", ["ten_nobody", "%00", "%2e%2e", "x" * 3000, "%F0%9F%92%A9"])
async def test_unknown_tenants(house: House, tenant_id: str) -> None:
    async with house.visitor() as browser:
        answer = await browser.get(f"/admin/tenants/{tenant_id}")
    assert answer.status_code == 404


# Faults


async def test_the_database_gone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_self: Any) -> None:
        raise DatabaseUnavailableError("OperationalError: unable to open database file")

    async with house.visitor() as browser:
        await browser.get("/admin")
        monkeypatch.setattr(type(house.services.database), "read", gone)
        page = await browser.get("/admin")
        assert (page.status_code, page.headers["retry-after"]) == (503, "5")
        assert "The database cannot be reached" in page.text
        assert "unable to open" not in page.text
        live = await browser.get("/admin/overview.json")
        assert live.status_code == 503
        assert live.json() == {"error": {"message": "The database cannot be reached."}}


async def test_valkey_gone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(*_args: Any, **_more: Any) -> None:
        raise RedisConnectionError("connection refused")

    async with house.visitor() as browser:
        monkeypatch.setattr(house.services.redis, "get", gone)
        for path in ("/admin", "/admin/overview.json"):
            answer = await browser.get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert "Valkey cannot be reached" in answer.text


async def test_a_fault_of_ours_is_a_page_and_a_log_line(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_args: Any) -> None:
        raise ZeroDivisionError("secret detail")

    async with house.visitor() as browser:
        monkeypatch.setattr("gateway.admin.overview.gather", broken)
        answer = await browser.get("/admin")
    assert answer.status_code == 500
    assert "secret detail" not in answer.text
    assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY


async def test_the_error_table_knows_every_foreign_error() -> None:
    assert len(ErrorPages(Pages()).handlers()) == 5
