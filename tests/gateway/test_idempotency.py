"""One idempotency key, one run, one bill: again, at once, when clients leave, when things break, on both databases."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import func, select

from gateway.api import idempotency
from tenancy import tables
from tenancy.accounts.ledger import capture, place_hold, void
from tenancy.closing import delete_tenant
from tenancy.idempotency import IdempotencyKey, claim, forget_expired
from tenancy.pricing.price_book import list_prices
from tests.fakes.byte_model import write_byte_model
from tests.fakes.hall import Hall, chat_body, open_hall, world
from tests.fakes.integer_worker import IntegerModel, IntegerWorker, Script
from tests.gateway.conftest import Stage
from tests.servers import PostgresServer

LONG = IntegerModel(eos_every=1_000_003)  # answers do not end by themselves
CHAT = "/v1/chat/completions"


async def ask(
    hall: Hall, key: str, text: str = "hello", *, tenant: str = "acme", path: str = CHAT, **fields: Any
) -> Any:
    how = {name: fields.pop(name) for name in ("leave_after", "stall_after", "on_sent") if name in fields}
    body = chat_body("integer", text, **fields)
    return await hall.call("POST", path, body, tenant=tenant, headers={"idempotency-key": key}, **how)


def code(answer: Any) -> tuple[int, str]:
    return answer.status, answer.json()["error"]["code"]


async def num_claims(hall: Hall) -> int:
    async with hall.database.read() as conn:
        return int(await conn.scalar(select(func.count()).select_from(tables.idempotency_key)) or 0)


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_request_again_gets_the_same_bytes(stage: Stage, runner: asyncio.Runner, stream: bool) -> None:
    hall, worker = stage.make()
    worker.model = LONG

    async def scenario() -> None:
        first = await ask(hall, "k1", max_tokens=5, stream=stream)
        again = await ask(hall, "k1", max_tokens=5, stream=stream)
        assert (again.status, again.body) == (first.status, first.body) == (200, first.body)
        assert again.headers["content-type"] == first.headers["content-type"]
        assert again.headers["x-bulkhead-replayed"] == first.headers["x-request-id"] != again.headers["x-request-id"]
        assert "x-bulkhead-replayed" not in first.headers
        assert again.headers.keys() >= {"x-request-id"}
        assert code(await ask(hall, "k1", max_tokens=6, stream=stream)) == (422, "idempotency_key_reused")
        other = await ask(hall, "k1", max_tokens=5, stream=stream, tenant="globex")
        assert "x-bulkhead-replayed" not in other.headers
        assert len(worker.submits) == len(await hall.usage_rows()) == 2
        (entry,) = await hall.outbox("request.replayed")
        assert entry["original_request_id"] == first.headers["x-request-id"]
        assert entry["request_id"] == again.headers["x-request-id"]
        await hall.check_books()

    runner.run(scenario())


async def at_once(hall: Hall, worker: IntegerWorker) -> None:
    worker.scripts += [Script(delay_s=0.01)]
    answers = await asyncio.gather(*(ask(hall, "k1", max_tokens=8, stream=True) for _ in range(6)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1
    assert len(worker.submits) == len(await hall.usage_rows()) == 1
    assert await hall.leases() == 0
    await hall.check_books()


def test_many_at_once_run_once(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make()
    worker.model = LONG
    runner.run(at_once(hall, worker))


def test_many_at_once_run_once_on_postgresql(
    runner: asyncio.Runner, redis: Redis, postgres_server: PostgresServer, short_folder: Path, tmp_path: Path
) -> None:
    url = postgres_server.new_served_database()

    async def scenario() -> None:
        worker = IntegerWorker(short_folder / "idempotency.sock", model=LONG)
        await worker.start()
        model = write_byte_model(tmp_path / "model")
        async with open_hall(tmp_path, redis, model, worker.path, world=world(), database_url=url) as hall:
            await at_once(hall, worker)
        await worker.stop()

    runner.run(scenario())


@pytest.mark.parametrize("how", ["leave_after", "stall_after"])
def test_who_left_comes_back_for_the_whole_answer(stage: Stage, runner: asyncio.Runner, how: str) -> None:
    hall, worker = stage.make(send_timeout_s=1)
    worker.model = LONG

    async def scenario() -> None:
        worker.scripts += [Script(delay_s=0.005)]
        await ask(hall, "k1", max_tokens=30, stream=True, **{how: 400})
        again = await ask(hall, "k1", max_tokens=30, stream=True)
        assert again.events()[-1] == "[DONE]"
        assert worker.aborted == []
        (row,) = (await hall.usage_rows()).values()
        assert (row.num_completion_tokens, row.finish_reason) == (30, "length")
        await hall.check_books()

    runner.run(scenario())


def test_a_failure_that_cost_nothing_frees_the_key(
    stage: Stage, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hall, worker = stage.make()
    monkeypatch.setattr(idempotency, "GRACE_NS", 0)
    worker.model = LONG

    async def scenario() -> None:
        worker.scripts += [Script(error_after=(2, "engine_failure"))]
        assert code(await ask(hall, "k1", max_tokens=5)) == (502, "engine_failure")
        assert await num_claims(hall) == 0
        hall.database.faults[:] = ["after"]  # T1, whose reply is lost
        assert (await ask(hall, "k1", max_tokens=5)).status == 503
        await hall.settler.drain(5)
        assert (await ask(hall, "k1", max_tokens=5)).status == 200
        rows = (await hall.usage_rows()).values()
        assert [row.amount_nano_usd > 0 for row in rows].count(True) == 1

    runner.run(scenario())


def test_what_was_charged_without_a_whole_answer_is_never_run_again(
    stage: Stage, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hall, worker = stage.make(idempotency_bytes_max=900)
    worker.model = LONG
    monkeypatch.setattr(idempotency, "GRACE_NS", 0)

    async def scenario() -> None:
        worker.scripts += [Script(error_after=(4, "engine_failure"))]
        cut = await ask(hall, "cut", max_tokens=9, stream=True)
        assert cut.events()[-2]["error"]["code"] == "engine_failure"
        for key, max_tokens in (("cut", 9), ("large", 90)):
            await ask(hall, key, max_tokens=max_tokens, stream=True)
            assert code(await ask(hall, key, max_tokens=max_tokens, stream=True)) == (409, "idempotency_answer_lost")
        assert len(worker.submits) == len(await hall.usage_rows()) == 2
        await hall.check_books()

    runner.run(scenario())


@pytest.mark.parametrize("charged", [True, False])
def test_a_key_whose_gateway_was_killed_is_what_its_hold_became(
    stage: Stage, runner: asyncio.Runner, charged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hall, worker = stage.make()
    monkeypatch.setattr(idempotency, "GRACE_NS", 0)
    acme = hall.accounts["acme"]

    async def scenario() -> None:
        known = await ask(hall, "k0")  # to have a body whose fingerprint is known
        assert known.status == 200
        async with hall.database.transaction() as conn:
            table, now_ns = tables.idempotency_key, hall.services.world.now_ns()
            fingerprint = await conn.scalar(select(table.c.fingerprint).where(table.c.key == "k0"))
            key = IdempotencyKey(acme.tenant_id, "k1", fingerprint or b"")
            (price,) = await list_prices(conn)
            await place_hold(
                conn,
                hold_id="hold_dead",
                tenant_id=acme.tenant_id,
                request_id="req_dead",
                price_id=price.price_id,
                amount_nano_usd=100,
                expires_ns=now_ns + 10**12,
                now_ns=now_ns,
            )
            assert await claim(conn, key, "req_dead", now_ns=now_ns, expires_ns=now_ns + 10**12, keys_max=9)
        waiting = asyncio.create_task(ask(hall, "k1"))
        await asyncio.sleep(0.1)
        assert not waiting.done()  # it may still run: nobody has settled it
        async with hall.database.transaction() as conn:
            now_ns = hall.services.world.now_ns()
            await (capture(conn, "hold_dead", 60, now_ns) if charged else void(conn, "hold_dead", now_ns))
        answer = await waiting
        if charged:
            assert code(answer) == (409, "idempotency_answer_lost")
        else:
            assert answer.status == 200
            assert answer.body != b""
        assert len(worker.submits) == 1 + (not charged)

    runner.run(scenario())


def test_keys_are_limited_expire_and_go_with_their_tenant(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make(idempotency_keys_max=2)

    async def scenario() -> None:
        for bad in ("", "x" * 256, "\x00"):
            answer = await ask(hall, bad)
            assert (answer.status, answer.json()["error"]["param"]) == (400, "Idempotency-Key")
        assert [(await ask(hall, key)).status for key in ("k1", "k2", "k1")] == [200, 200, 200]
        assert code(await ask(hall, "k3")) == (429, "idempotency_keys_exhausted")
        assert (await ask(hall, "k3", tenant="globex")).status == 200
        await hall.check_books()
        now_ns = hall.services.world.now_ns()
        async with hall.database.transaction() as conn:
            await delete_tenant(conn, hall.accounts["globex"].tenant_id, now_ns=now_ns)
            assert await forget_expired(conn, now_ns) == 0
        assert await num_claims(hall) == 2
        async with hall.database.transaction() as conn:
            ttl_ns = hall.services.settings.idempotency_ttl_s * 10**9
            assert await forget_expired(conn, now_ns + ttl_ns) == 2
        num_submits = len(worker.submits)
        assert (await ask(hall, "k1")).status == 200
        assert len(worker.submits) == num_submits + 1

    runner.run(scenario())
