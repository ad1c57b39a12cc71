"""What the operator sees when something is gone."""

from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from gateway.admin.security import CONTENT_SECURITY_POLICY
from gateway.database import DatabaseUnavailableError
from tests.gateway_admin.house import House

pytestmark = pytest.mark.anyio


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
