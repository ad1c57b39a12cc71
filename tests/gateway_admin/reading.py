"""Reading the pages back: their fields, tags and amounts; and a house with something to read."""

import re
from html.parser import HTMLParser

import httpx

from tenancy.money import NANO_PER_USD
from tenancy.quotas.limits import set_limits
from tests.gateway_admin.house import House

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
