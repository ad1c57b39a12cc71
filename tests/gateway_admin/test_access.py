"""Closed by default: no page without a session, and every answer tells the browser what it may do."""

import os
import re

import pytest
from starlette.routing import BaseRoute, Mount, Route

from gateway.admin.routes import PUBLIC, AdminSite, is_public
from gateway.admin.security import CONTENT_SECURITY_POLICY, HEADERS
from gateway.admin.sessions import SessionStore
from tests.gateway_admin.house import House
from tests.gateway_admin.reading import PageText, busy

pytestmark = pytest.mark.anyio


def paths_of(routes: list[BaseRoute]) -> list[str]:
    found = []
    for route in routes:
        assert isinstance(route, Route | Mount)
        found.append(re.sub(r"\{[^}]+\}", "x", route.path))
    return found


async def test_no_page_without_a_session(house: House) -> None:
    """Walks the very routes that are served: a new one is closed until it is named in PUBLIC."""
    await busy(house)
    site = AdminSite(house.services, SessionStore(house.services.redis, b"", now_ns=house.clock, entropy=os.urandom))
    paths = [path for path in paths_of(site.routes()) if not is_public(path + "/")]
    assert {"/admin", "/admin/overview.json", "/admin/tenants/x", "/admin/logout"} <= set(paths)
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
                ("GET", "/admin//"),
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
    assert {a.status_code for a in answers} == {200, 303, 308, 400, 404, 405, 415}
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
