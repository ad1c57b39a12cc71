"""How often a request asks the database and the store: counted, so that it does not creep up. And what it does not ask
again is not believed where it matters."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis
from sqlalchemy import event

from gateway import remembered
from gateway.api import auth
from gateway.api.auth import authenticated, look_again
from gateway.database import DatabaseUnavailableError
from gateway.trips import Trips
from tenancy.access.keys import revoke_key
from tenancy.quotas.limits import set_limits
from tests.fakes.hall import Hall, chat_body
from tests.gateway.conftest import Stage
from tests.servers import PostgresServer


@pytest.fixture
def postgres_stage(
    runner: asyncio.Runner, redis: Redis, tmp_path: Path, short_folder: Path, postgres_server: PostgresServer
) -> Iterator[Stage]:
    one = Stage(runner, redis, tmp_path, short_folder, postgres_server.new_served_database)
    yield one
    one.close()


@dataclass
class Asked:
    statements: list[str] = field(default_factory=list)
    num_transactions: int = 0
    num_calls: int = 0  # of the store


def listen(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    engine = hall.database._engine.sync_engine

    def note(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    value = Trips.value

    async def valued(self: Trips, text: str, arguments: tuple[object, ...]) -> Any:
        asked.statements.append(text)
        return await value(self, text, arguments)

    monkeypatch.setattr(Trips, "value", valued)
    begin = asyncpg.transaction.Transaction.start

    async def began(self: Any) -> None:
        asked.num_transactions += 1
        await begin(self)

    monkeypatch.setattr(asyncpg.transaction.Transaction, "start", began)
    call = hall.services.redis.execute_command

    async def called(*args: Any, **options: Any) -> Any:
        asked.num_calls += 1
        return await call(*args, **options)

    monkeypatch.setattr(hall.services.redis, "execute_command", called)
    return asked


def bearer(secret: str) -> dict[str, Any]:
    return {"headers": [(b"authorization", f"Bearer {secret}".encode())], "client": ("127.0.0.1", 1)}


async def one_more(hall: Hall, asked: Asked, **fields: Any) -> None:
    asked.statements.clear()
    asked.num_transactions = asked.num_calls = 0
    assert (await hall.chat(max_tokens=3, **fields)).status == 200
    assert await hall.settler.drain(5) == 0


def test_on_postgresql_a_request_is_two_statements(
    postgres_stage: Stage, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T1 and T2, each a transaction by itself. Who asks was known, or is one statement more."""
    monkeypatch.setattr(remembered, "CALLER_NS", 60 * 10**9)  # not looked up again while the test runs
    hall, _ = postgres_stage.make(remember=True)
    asked = listen(hall, monkeypatch)

    async def scenario() -> None:
        await one_more(hall, asked)
        first = len(asked.statements)  # nothing is known of price and key yet
        assert first <= 22
        for stream in (False, True):
            await one_more(hall, asked, stream=stream)
            assert [one.partition("(SELECT ")[2].partition("(")[0] for one in asked.statements] == [
                "place_hold_v1",
                "settle_hold_v2",
            ]
            assert asked.num_transactions == 0
            assert asked.num_calls == 2
        monkeypatch.setattr(hall.services.remembered, "_callers", {})
        await one_more(hall, asked)
        assert len(asked.statements) == 3
        assert asked.num_transactions == 0
        await hall.check_books()

    runner.run(scenario())


def test_who_asks_often_is_looked_up_after_an_answer(
    postgres_stage: Stage, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hall, _ = postgres_stage.make(remember=True)
    monkeypatch.setattr(remembered, "CALLER_NS", 60 * 10**9)
    asked = listen(hall, monkeypatch)

    async def scenario() -> None:
        await one_more(hall, asked)
        await one_more(hall, asked)
        assert len(asked.statements) == 2  # too young
        monkeypatch.setattr(remembered, "AGEING_NS", 60 * 10**9)
        await one_more(hall, asked)
        assert [("place" in one, "settle" in one, "api_key.secret" in one) for one in asked.statements] == [
            (True, False, False),
            (False, True, False),
            (False, False, True),
        ]

    runner.run(scenario())


def test_one_of_many_looks_a_caller_up_again(
    postgres_stage: Stage, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hall, _ = postgres_stage.make(remember=True)
    services, known = hall.services, hall.services.remembered._callers
    monkeypatch.setattr(remembered, "CALLER_NS", 60 * 10**9)
    monkeypatch.setattr(remembered, "AGEING_NS", 60 * 10**9)
    scope = bearer(hall.accounts["acme"].secret)
    num_lookups, go_on, identified = 0, asyncio.Event(), auth.identify

    async def slowly(*arguments: Any, **options: Any) -> Any:
        nonlocal num_lookups
        num_lookups += 1
        await go_on.wait()
        return await identified(*arguments, **options)

    async def scenario() -> None:
        await authenticated(services, scope, may_remember=True)
        caller = await authenticated(services, scope, may_remember=True)
        (until,) = (found[2] for found in known.values())
        monkeypatch.setattr(auth, "identify", slowly)
        looking = [asyncio.ensure_future(look_again(services, scope, caller)) for _ in range(6)]
        await asyncio.sleep(0.05)
        go_on.set()
        await asyncio.gather(*looking)
        assert num_lookups == 1
        assert [found[2] > until for found in known.values()] == [True]
        await look_again(services, scope, caller)
        assert num_lookups == 2  # and the next time somebody does again

    runner.run(scenario())


@pytest.mark.parametrize("ends", ["revoked", "unreachable"])
def test_who_cannot_be_looked_up_again_is_forgotten(
    postgres_stage: Stage, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    hall, _ = postgres_stage.make(remember=True)
    services, account = hall.services, hall.accounts["acme"]
    scope = bearer(account.secret)
    monkeypatch.setattr(remembered, "CALLER_NS", 60 * 10**9)
    monkeypatch.setattr(remembered, "AGEING_NS", 60 * 10**9)

    async def gone(*_: Any) -> None:
        raise DatabaseUnavailableError("gone")

    async def scenario() -> None:
        await authenticated(services, scope, may_remember=True)
        caller = await authenticated(services, scope, may_remember=True)
        assert caller.remembered
        if ends == "revoked":
            async with hall.database.transaction() as conn:
                await revoke_key(conn, account.key_id, now_ns=services.world.now_ns())
        else:
            monkeypatch.setattr(auth, "identify", lambda *_, **__: gone())
        await look_again(services, scope, caller)
        assert not services.remembered._callers
        assert not services.remembered._looked_up

    runner.run(scenario())


@pytest.mark.parametrize("streamed", [True, False])
def test_a_key_is_dead_at_once_although_it_is_remembered(
    postgres_stage: Stage, runner: asyncio.Runner, streamed: bool
) -> None:
    """Also for a request in the general way, as one with an idempotency key is."""
    hall, _ = postgres_stage.make(remember=True)
    account = hall.accounts["acme"]

    async def scenario() -> None:
        for _ in range(2):
            assert (await hall.chat(max_tokens=1)).status == 200
        async with hall.database.transaction() as conn:
            await revoke_key(conn, account.key_id, now_ns=hall.services.world.now_ns())
        assert (await hall.chat(max_tokens=1, stream=streamed)).status == 401
        body = chat_body("integer", max_tokens=1)
        answer = await hall.call("POST", "/v1/chat/completions", body, tenant="acme", headers={"idempotency-key": "k"})
        assert answer.status == 401
        assert (await hall.chat(max_tokens=1, tenant="globex")).status == 200
        await hall.check_books()
        assert (await hall.num_rows())["hold"] == 3
        assert await hall.leases() == 0

    runner.run(scenario())


def test_a_remembered_key_needs_its_secret(postgres_stage: Stage, runner: asyncio.Runner) -> None:
    hall, _ = postgres_stage.make(remember=True)
    secret = hall.accounts["acme"].secret

    async def scenario() -> None:
        for text in (secret, secret[:-1] + ("A" if secret[-1] != "A" else "E"), secret):
            body = chat_body("integer", max_tokens=1)
            answer = await hall.call("POST", "/v1/chat/completions", body, headers={"authorization": f"Bearer {text}"})
            assert answer.status == (200 if text == secret else 401)

    runner.run(scenario())


def test_a_limit_that_is_set_holds_within_a_second(postgres_stage: Stage, runner: asyncio.Runner) -> None:
    hall, _ = postgres_stage.make(remember=True)

    async def scenario() -> None:
        assert (await hall.chat(max_tokens=1)).status == 200
        async with hall.database.transaction() as conn:
            await set_limits(conn, "key", hall.accounts["acme"].key_id, requests_per_minute=0, now_ns=0)
        await asyncio.sleep(1)
        assert (await hall.chat(max_tokens=1)).status == 429

    runner.run(scenario())


def test_on_sqlite_a_request_is_three_transactions(
    stage: Stage, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hall, _ = stage.make(database_url="")
    asked = listen(hall, monkeypatch)

    async def scenario() -> None:
        for _ in range(2):  # the first one also asks for the epoch of its counters
            await one_more(hall, asked)
        begins = [one for one in asked.statements if one.startswith("BEGIN")]
        assert sorted(begins) == ["BEGIN", "BEGIN IMMEDIATE", "BEGIN IMMEDIATE"]
        assert len(asked.statements) - len(begins) <= 25
        assert asked.num_calls == 2
        await hall.check_books()

    runner.run(scenario())
