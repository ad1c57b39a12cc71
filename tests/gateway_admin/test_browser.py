"""The admin page in a real browser over real TLS: figures move by themselves, nothing is loaded from elsewhere.

Needs chromium (Debian: apt-get install chromium) and is skipped, saying so, where there is none.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn
from playwright.async_api import Browser, Page, async_playwright
from starlette.applications import Starlette

from gateway.host.tls import ensure_certificates
from tenancy.quotas.limits import set_limits
from tenancy.usage.meter import Usage
from tests.gateway_admin.house import NAME, PASSWORD, House, build_house

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install -y chromium"),
]


@dataclass
class Watched:
    """A page and everything that it did wrong."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)


@asynccontextmanager
async def serving(app: Starlette, folder: Path) -> AsyncIterator[str]:
    """`app` over TLS on a free loopback port; gives its origin."""
    files = ensure_certificates(folder / "tls", "127.0.0.1", time.time_ns())
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        ssl_certfile=files.certificate,
        ssl_keyfile=str(files.key),
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
        assert not task.done()
    try:
        yield f"https://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def opened(
    browser: Browser, *, has_script: bool = True, width: int = 1400, dark: bool = False
) -> AsyncIterator[Watched]:
    context = await browser.new_context(
        ignore_https_errors=True,
        java_script_enabled=has_script,
        viewport={"width": width, "height": 900},
        color_scheme="dark" if dark else "light",
    )
    watched = Watched(await context.new_page())
    watched.page.on("console", lambda m: watched.complaints.append(m.text) if m.type in ("error", "warning") else None)
    watched.page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    watched.page.on("request", lambda request: watched.hosts.add(urlsplit(request.url).hostname or request.url))
    try:
        yield watched
    finally:
        await context.close()


@pytest.fixture
async def site(tmp_path: Path, valkey_socket: Path, anyio_backend: str) -> AsyncIterator[tuple[House, str, Browser]]:
    async with (
        build_house(tmp_path, valkey_socket, clock=time.time_ns) as house,
        serving(house.app, tmp_path) as origin,
        async_playwright() as playwright,
    ):
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        try:
            yield house, origin, browser
        finally:
            await browser.close()


async def nudge(page: Page) -> None:
    """What coming back to the tab does: look now instead of in two seconds."""
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


async def log_in(page: Page, origin: str) -> None:
    await page.goto(f"{origin}/admin")
    assert page.url == f"{origin}/admin/login"
    await page.get_by_label("Name").fill(NAME)
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Log in").click()
    await page.wait_for_url(f"{origin}/admin")


async def test_figures_change_by_themselves(site: tuple[House, str, Browser]) -> None:
    house, origin, browser = site
    acme, globex = await house.add_tenant("acme"), await house.add_tenant("globex")
    await house.heartbeat()
    async with opened(browser) as watched:
        page = watched.page
        await log_in(page, origin)
        requests = page.locator(f'[data-field="{acme.tenant_id}.requests"]')
        assert await requests.inner_text() == "0"
        await page.get_by_text("Live", exact=True).wait_for()
        bars = page.locator(f'path[data-chart="{acme.tenant_id}"][data-kind="completion"]')
        assert await bars.get_attribute("d") == ""

        placed = await house.hold(acme, 120, 80)
        held = page.locator(f'[data-field="{acme.tenant_id}.held"]')
        await page.wait_for_function("e => e.textContent.trim() !== '$0.00'", arg=await held.element_handle())
        await house.settle(acme, placed, Usage(120, 32, 64))
        await nudge(page)
        await page.wait_for_function("e => e.textContent === '1'", arg=await requests.element_handle())
        assert (await held.inner_text()).strip() == "$0.00"
        assert await page.locator('[data-field="total.prompt"]').inner_text() == "120"
        assert (await bars.get_attribute("d") or "").startswith("M")

        await house.worker.report({acme.tenant_id: 7})
        await nudge(page)
        blocks = page.locator(f'[data-field="{acme.tenant_id}.blocks"]')
        await page.wait_for_function("e => e.textContent === '7'", arg=await blocks.element_handle())

        await house.add_tenant("initech")  # a new row: the page fetches itself again
        await nudge(page)
        await page.get_by_role("link", name="initech").wait_for()

        await page.get_by_role("link", name="acme").click()
        await page.get_by_text("Agrees to the nano-USD").wait_for()
        assert globex.tenant_id not in await page.content()

        await page.get_by_role("button", name="Log out").click()
        await page.wait_for_url(f"{origin}/admin/login")
        await page.goto(f"{origin}/admin/tenants/{acme.tenant_id}")
        assert page.url == f"{origin}/admin/login"
        assert watched.complaints == []
        assert watched.hosts == {"127.0.0.1"}


async def test_an_open_page_says_when_its_session_or_its_server_is_gone(
    site: tuple[House, str, Browser],
) -> None:
    house, origin, browser = site
    await house.add_tenant("acme")
    async with opened(browser) as watched:
        page = watched.page
        await log_in(page, origin)
        await page.get_by_text("Live", exact=True).wait_for()
        await page.route("**/overview.json*", lambda route: route.abort())
        await nudge(page)
        await page.get_by_text("The server does not answer. Trying again.").wait_for()
        await page.unroute("**/overview.json*")
        await nudge(page)
        await page.get_by_text("Live", exact=True).wait_for()
        await house.services.redis.flushall()
        await nudge(page)
        await page.get_by_text("Session ended. Refresh to log in again.").wait_for()
        assert watched.hosts == {"127.0.0.1"}


async def test_without_script_the_page_is_complete(site: tuple[House, str, Browser]) -> None:
    house, origin, browser = site
    acme = await house.add_tenant("acme")
    async with opened(browser, has_script=False) as watched:
        page = watched.page
        await log_in(page, origin)
        await house.serve(acme, 10, 0, 5)
        await page.get_by_role("link", name="Refresh").click()
        assert await page.locator(f'[data-field="{acme.tenant_id}.requests"]').inner_text() == "1"
        assert not await page.locator("#live").is_visible()
        await page.get_by_role("button", name="Log out").click()
        await page.wait_for_url(f"{origin}/admin/login")
        assert watched.complaints == []


async def test_nothing_is_wider_than_the_screen(site: tuple[House, str, Browser]) -> None:
    """Only tables scroll sideways."""
    house, origin, browser = site
    acme = await house.add_tenant("acme")
    await house.add_tenant("a tenant with a long name of a hundred characters" + "x" * 50)
    async with house.services.database.transaction() as conn:
        await set_limits(
            conn, "tenant", acme.tenant_id, requests_per_minute=60, tokens_per_minute=10_000, now_ns=house.clock()
        )
    for ago_s in range(0, 3000, 600):
        await house.serve(acme, 100 + ago_s, ago_s // 10, 64, ago_s=ago_s)
    pages = ("/admin/login", "/admin", f"/admin/tenants/{acme.tenant_id}", "/admin/nowhere")
    for width, dark in ((1400, False), (768, True), (360, False)):
        async with opened(browser, width=width, dark=dark) as watched:
            page = watched.page
            for path in pages:
                if path == "/admin":
                    await log_in(page, origin)
                await page.goto(origin + path)
                root = "document.documentElement"
                overflow = await page.evaluate(f"{root}.scrollWidth - {root}.clientWidth")
                assert overflow <= 0, f"{path} is {overflow} px wider than {width} px"
