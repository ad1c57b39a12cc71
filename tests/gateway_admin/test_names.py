"""A tenant may be called anything; it stays text."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update

from gateway.admin import view as view_module
from gateway.admin.overview import PERIODS, add_up, empty_minutes
from gateway.admin.overview import TenantFigures as Figures
from gateway.admin.render import Pages
from tenancy.tables import tenant
from tests.gateway_admin.house import NOON_NS, House
from tests.gateway_admin.reading import PageText

pytestmark = pytest.mark.anyio


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
    from gateway.admin.overview import Money, Overview

    use = {key: LimitUse(None, None) for key in ("requests", "tokens", "concurrency")}
    row = Figures("ten_1", name, status, 0, 0, 0, 0, {"EUR": Money(0, 0, 0)}, 0, use, empty_minutes(NOON_NS))
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
            "append_only",
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
