"""Logging in and out, and what ends a session."""

import asyncio
from typing import Any

import msgspec
import pytest
from sqlalchemy import select, update

from audit.transparency.tables import outbox
from gateway.admin import attempts, login, sessions
from gateway.admin.sessions import COOKIE
from gateway.database import DatabaseUnavailableError
from tenancy.tables import operator
from tests.gateway_admin.house import NAME, ORIGIN, PASSWORD, House, csrf_token, log_in

pytestmark = pytest.mark.anyio


async def entries(house: House) -> list[tuple[str, dict[str, Any]]]:
    async with house.services.database.read() as conn:
        rows = await conn.execute(select(outbox.c.kind, outbox.c.body).order_by(outbox.c.id))
        return [(kind, msgspec.json.decode(body)) for kind, body in rows]


async def test_a_log_in_gives_one_safe_cookie_and_one_log_entry(house: House) -> None:
    async with house.browser() as browser:
        answer = await log_in(browser)
        assert (answer.status_code, answer.headers["location"]) == (303, "/admin")
        (cookie,) = answer.headers.get_list("set-cookie")
        name, _, rest = cookie.partition("=")
        value, *attributes = rest.split("; ")
        assert name == "__Host-bulkhead"
        assert len(value) == 43
        assert {a.lower() for a in attributes} == {"path=/", "secure", "httponly", "samesite=strict"}
        assert (await browser.get("/admin")).status_code == 200
        assert await entries(house) == [("operator.logged_in", {"name": NAME})]


async def test_valkey_never_sees_the_session_id(house: House) -> None:
    async with house.visitor() as browser:
        session_id = browser.cookies[COOKIE]
        redis = house.services.redis
        for key in await redis.keys("*"):
            value = await redis.get(key)
            assert session_id.encode() not in key
            assert isinstance(value, bytes)
            assert session_id.encode() not in value


@pytest.mark.parametrize(
    ("name", "password", "logged"),
    [
        (NAME, PASSWORD + "r", NAME),
        (NAME, "", NAME),
        ("nobody", PASSWORD, ""),
        (PASSWORD, NAME, ""),  # a password in the name's field never reaches the log
        ("", "", ""),
        ("\0", PASSWORD, ""),
        ("<script>alert(1)</script>", "x", ""),
    ],
)
async def test_a_wrong_log_in_is_logged_and_says_nothing_more(
    house: House, name: str, password: str, logged: str
) -> None:
    async with house.browser() as browser:
        answer = await log_in(browser, name, password)
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers
        assert "Name or password is wrong." in answer.text
        assert "<script>alert" not in answer.text
        assert await entries(house) == [("operator.login_failed", {"name": logged})]


@pytest.mark.parametrize("form", [{}, {"name": "x" * 101, "password": "y"}, {"name": NAME, "password": "x" * 1025}])
async def test_what_cannot_be_a_log_in_is_not_even_hashed(house: House, form: dict[str, str]) -> None:
    async with house.browser() as browser:
        answer = await browser.post("/admin/login", data=form or {"other": "field"})
        assert answer.status_code == 401


async def test_guesses_are_bounded_for_one_name_and_address(house: House) -> None:
    async with house.browser() as browser:
        for _ in range(attempts.ATTEMPTS_MAX):
            assert (await log_in(browser, password="wrong guess here")).status_code == 401
        answer = await log_in(browser)  # the right one comes too late
        assert answer.status_code == 429
        assert 0 < int(answer.headers["retry-after"]) <= 15 * 60
        assert "Too many attempts. Try again in 15 minutes." in answer.text
        assert "set-cookie" not in answer.headers
        assert (await log_in(browser, "nobody")).status_code == 401, "another name is counted by itself"
    async with house.browser("192.0.2.9") as elsewhere:
        assert (await log_in(elsewhere)).status_code == 303, "nobody can lock an operator out from somewhere else"


async def test_parallel_guesses_do_not_slip_past_the_bound(house: House) -> None:
    async with house.browser() as browser:
        answers = await asyncio.gather(*(log_in(browser, password=f"wrong guess {i}") for i in range(12)))
    assert sorted(a.status_code for a in answers) == [401] * 5 + [429] * 7


async def test_an_address_is_bounded_over_all_names(house: House) -> None:
    counter = attempts.Attempts(house.services.redis, b"key")
    for i in range(attempts.ADDRESS_ATTEMPTS_MAX):
        await counter.count(f"name {i}", "2001:db8::1")
    with pytest.raises(attempts.TooManyAttemptsError):
        await counter.count("another name", "2001:db8::2")  # the same /64
    await counter.count("another name", "2001:db8:0:1::1")


async def test_a_success_forgives_earlier_slips(house: House) -> None:
    async with house.browser() as browser:
        for _ in range(2):
            for _ in range(attempts.ATTEMPTS_MAX - 1):
                await log_in(browser, password="wrong guess here")
            assert (await log_in(browser)).status_code == 303


async def test_a_log_in_waits_for_a_place_only_in_a_short_queue(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "WAITERS_MAX", 0)
    async with house.browser() as browser:
        answer = await log_in(browser)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "in a few seconds" in answer.text


async def test_a_log_in_that_cannot_be_logged_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house.services.database.transaction() as conn:
        await conn.exec_driver_sql(
            "CREATE TRIGGER full BEFORE INSERT ON outbox BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
        )
    async with house.browser() as browser:
        answer = await log_in(browser)
        assert answer.status_code in (500, 503)
        assert "set-cookie" not in answer.headers
        assert (await browser.get("/admin")).status_code == 303
        assert [key async for key in house.services.redis.scan_iter("bulkhead:admin:session:*")] == []


async def test_logging_in_again_replaces_the_session(house: House) -> None:
    async with house.visitor() as browser:
        first = browser.cookies[COOKIE]
        await log_in(browser)
        assert browser.cookies[COOKIE] != first
        async with house.browser() as thief:
            thief.cookies.set(COOKIE, first, domain="127.0.0.1")
            assert (await thief.get("/admin")).status_code == 303


async def test_an_id_that_the_browser_brings_along_is_never_adopted(house: House) -> None:
    async with house.browser() as browser:
        browser.cookies.set(COOKIE, "A" * 43, domain="127.0.0.1")
        answer = await log_in(browser)
        assert answer.cookies[COOKIE] != "A" * 43


async def test_log_out_destroys_the_session(house: House) -> None:
    async with house.visitor() as browser:
        stolen = browser.cookies[COOKIE]
        token = csrf_token(await browser.get("/admin"))
        answer = await browser.post("/admin/logout", data={"csrf_token": token})
        assert (answer.status_code, answer.headers["location"]) == (303, "/admin/login")
        assert COOKIE not in browser.cookies
        browser.cookies.set(COOKIE, stolen, domain="127.0.0.1")
        assert (await browser.get("/admin")).headers["location"] == "/admin/login"
        assert (await browser.post("/admin/logout", data={"csrf_token": token})).status_code != 200
    kinds = [kind for kind, _ in await entries(house)]
    assert kinds == ["operator.logged_in", "operator.logged_out"]


async def test_a_session_ends_when_nobody_looks(house: House) -> None:
    async with house.visitor() as browser:
        for _ in range(3):
            house.clock.advance(20 * 60)
            assert (await browser.get("/admin")).status_code == 200
        house.clock.advance(20 * 60)
        assert (await browser.get("/admin/overview.json")).status_code == 200
        house.clock.advance(10 * 60)  # the poll was no page view: 30 minutes have passed
        assert (await browser.get("/admin/overview.json")).status_code == 401
        assert (await browser.get("/admin")).status_code == 303


async def test_a_session_ends_after_its_absolute_time_however_busy(house: House) -> None:
    async with house.visitor() as browser:
        for _ in range(sessions.ABSOLUTE_NS // (20 * 60 * 10**9) - 1):
            house.clock.advance(20 * 60)
            assert (await browser.get("/admin")).status_code == 200
        house.clock.advance(20 * 60)
        assert (await browser.get("/admin")).status_code == 303


async def test_a_disabled_operator_is_out_at_once(house: House) -> None:
    async with house.visitor() as browser:
        async with house.services.database.transaction() as conn:
            await conn.execute(update(operator).values(disabled_ns=1))
        assert (await browser.get("/admin")).status_code == 303
        assert (await log_in(browser)).status_code == 401


async def test_a_destroyed_session_is_not_revived_by_a_page_view_at_the_same_moment(house: House) -> None:
    store = sessions.SessionStore(house.services.redis, b"k", now_ns=house.clock, entropy=house.services.world.entropy)
    session_id = await store.create("opr_1", "olga")
    session = await store.find(session_id, touch=False)
    assert session is not None
    await store.destroy(session_id)
    await store._write(session_id, session, only_existing=True)
    assert await store.find(session_id, touch=True) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
        {"origin": "null", "sec-fetch-site": "cross-site"},
        {"origin": ORIGIN, "sec-fetch-site": "same-site"},
        {"origin": "https://evil.example"},
        {},
    ],
)
async def test_foreign_posts_are_refused(house: House, headers: dict[str, str]) -> None:
    async with house.visitor() as browser:
        token = csrf_token(await browser.get("/admin"))
        del browser.headers["origin"], browser.headers["sec-fetch-site"]
        form = {"name": NAME, "password": PASSWORD, "csrf_token": token}
        for path in ("/admin/login", "/admin/logout", "/admin", "/admin/nowhere"):
            answer = await browser.post(path, data=form, headers=headers)
            assert answer.status_code == 403
            assert "set-cookie" not in answer.headers
        assert (await browser.get("/admin")).status_code == 200, "the session is untouched"


async def test_a_form_of_another_session_is_refused(house: House) -> None:
    async with house.visitor() as browser:
        for token in ("", "x", "é", "A" * 43):
            assert (await browser.post("/admin/logout", data={"csrf_token": token})).status_code == 403
        assert (await browser.post("/admin/logout", data={"other": "x"})).status_code == 403
        assert (await browser.get("/admin")).status_code == 200


BAD_FORMS = [
    (b"name=a&password=b", "application/json", 415),
    (b"name=a&password=b", "", 415),
    (b"name=a&password=" + b"b" * 20_000, "application/x-www-form-urlencoded", 413),
    (b"&".join(b"a=b" for _ in range(20)), "application/x-www-form-urlencoded", 400),
    (b"name=\xff", "application/x-www-form-urlencoded", 400),
    (b"name=%ff", "application/x-www-form-urlencoded", 400),
    (b"", "application/x-www-form-urlencoded", 401),
]


async def test_bad_forms(house: House) -> None:
    async with house.browser() as browser:
        for content, content_type, status in BAD_FORMS:
            answer = await browser.post("/admin/login", content=content, headers={"content-type": content_type})
            assert answer.status_code == status, content[:40]


async def test_the_database_gone_means_nobody_gets_in(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise DatabaseUnavailableError("OperationalError: unable to open database file")

    async with house.browser() as browser:
        monkeypatch.setattr(type(house.services.database), "read", lambda _self: gone())
        answer = await log_in(browser)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "The database cannot be reached" in answer.text
        assert "set-cookie" not in answer.headers
