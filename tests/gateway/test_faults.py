"""Whatever breaks and whenever, every admitted request is settled exactly once and the books agree with the engine."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.api import exchange
from gateway.api.edge import Edge
from gateway.api.endings import COMPLETE
from gateway.api.settlement import NOTHING
from gateway.host.valkey import connect_redis
from tests.fakes.asgi import Answer
from tests.fakes.flaky_database import Fault
from tests.fakes.hall import Hall, chat_body, open_hall, reconnect, world
from tests.fakes.integer_worker import IntegerModel, IntegerWorker, Script
from tests.gateway.conftest import Stage

LONG = IntegerModel(eos_every=1_000_003)  # never ends by itself


def texts_of(answer: Answer) -> str:
    """The text that reached the client, streamed or whole."""
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        body = answer.json() if answer.complete else {}
        return "".join(choice["message"]["content"] for choice in body.get("choices", []))
    choices = [c for e in answer.events() if e != "[DONE]" and "choices" in e for c in e["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def errors_of(answer: Answer) -> list[str]:
    return [e["error"]["code"] for e in answer.events() if e != "[DONE]" and "error" in e]


# --- the property -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One request and what happens to it."""

    stream: bool
    max_tokens: int
    tenant: str
    script: Script
    leave_after: int | None
    cancel_after: int | None  # tokens of any sequence, then the server cuts this request


SCRIPTS = st.one_of(
    st.just(Script()),
    st.builds(Script, die_after=st.integers(0, 12)),
    st.builds(Script, withhold=st.integers(2, 5), die_after=st.none() | st.integers(0, 12)),
    st.builds(
        Script,
        error_after=st.tuples(
            st.integers(0, 12), st.sampled_from(["isolation_violation", "engine_failure", "busy", "draining"])
        ),
    ),
)
PLANS = st.builds(
    Plan,
    stream=st.booleans(),
    max_tokens=st.integers(1, 20),
    tenant=st.sampled_from(["acme", "globex"]),
    script=SCRIPTS,
    leave_after=st.none() | st.integers(1, 3_000),
    cancel_after=st.none() | st.integers(1, 20),
)
# At most four, because the pauses between tries double: eight in a row would take ten seconds.
FAULTS: st.SearchStrategy[list[Fault]] = st.lists(st.sampled_from(["none", "none", "before", "after"]), max_size=4)


@pytest.fixture(scope="module")
def broken_stage(shared_stage: Stage) -> tuple[Hall, IntegerWorker]:
    hall, worker = shared_stage.make()
    worker.num_cached_tokens = 4
    return hall, worker


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(plans=st.lists(PLANS, min_size=1, max_size=4), faults=FAULTS)
def test_every_request_is_settled_exactly_once(
    broken_stage: tuple[Hall, IntegerWorker], runner: asyncio.Runner, plans: list[Plan], faults: list[Fault]
) -> None:
    hall, worker = broken_stage
    runner.run(_play(hall, worker, plans, faults))


async def _play(hall: Hall, worker: IntegerWorker, plans: list[Plan], faults: list[Fault]) -> None:
    if hall.services.engine.status.state != "ready":
        await reconnect(hall, worker.path)
    worker.counts.clear()
    worker.submits.clear()
    worker.scripts[:] = [plan.script for plan in plans]
    hall.database.faults[:] = faults
    before = set(await hall.usage_rows())

    async def one(plan: Plan) -> Answer | None:
        body = chat_body("integer", stream=plan.stream, max_tokens=plan.max_tokens)
        call = hall.prepare("POST", "/v1/chat/completions", body, tenant=plan.tenant, leave_after=plan.leave_after)
        task = asyncio.create_task(call.run(hall.app))
        if plan.cancel_after is not None:
            cancels.append((plan.cancel_after, task))
        try:
            return await task
        except asyncio.CancelledError:
            return None

    cancels: list[tuple[int, asyncio.Task[Answer]]] = []
    num_tokens = 0

    def on_token(_: str, __: int) -> None:
        nonlocal num_tokens
        num_tokens += 1
        for after, task in cancels:
            if num_tokens == after:
                task.cancel()

    worker.on_token = on_token
    answers = await asyncio.gather(*(one(plan) for plan in plans))
    worker.on_token = None
    assert await hall.settler.drain(5) == 0
    hall.database.faults.clear()

    await hall.check_books()
    rows = await hall.usage_rows()
    assert worker.counts.keys() <= rows.keys()
    cut = any(plan.script.die_after is not None or plan.cancel_after is not None for plan in plans)
    for request_id, counts in worker.counts.items():
        row = rows[request_id]
        told = counts.finish_reason and not cut  # else the last counts may have been lost on their way
        if row.finish_reason in COMPLETE or (row.finish_reason == "client_gone" and told):
            assert row.num_completion_tokens == counts.num_completion_tokens
        assert row.num_completion_tokens <= counts.num_completion_tokens
        if row.num_completion_tokens:
            assert row.num_prompt_tokens == counts.num_prompt_tokens
            assert row.num_cached_tokens == counts.num_cached_tokens
        else:
            assert row.amount_nano_usd == 0
    assert await hall.leases() == 0
    for plan, answer in zip(plans, answers, strict=True):
        if answer is None or not answer.complete:
            continue
        assert answer.status in (200, 500, 502, 503)
        row = rows.get(answer.headers["x-request-id"])
        if answer.status != 200:
            assert row is None or row.amount_nano_usd == 0
            assert answer.headers["x-request-id"] not in before
            continue
        assert row is not None
        num_received = len(texts_of(answer).split())
        if errors_of(answer):
            assert plan.stream
            assert row.num_completion_tokens >= num_received  # withheld text may be paid for with what follows it
            assert row.num_completion_tokens - num_received <= max(p.script.withhold for p in plans)
        else:
            assert row.finish_reason in COMPLETE
        if plan.stream:
            assert answer.events()[-1] == "[DONE]"


# --- single faults ----------------------------------------------------------------------------------------------------


def only_row(hall: Hall, runner: asyncio.Runner) -> Any:
    (row,) = runner.run(hall.usage_rows()).values()
    return row


def test_a_killed_worker_ends_a_stream_with_an_error_event(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make()
    worker.model = LONG
    worker.scripts.append(Script(die_after=5, delay_s=0.01))
    answer = runner.run(hall.chat(max_tokens=50, stream=True))
    assert answer.status == 200
    assert errors_of(answer) == ["engine_gone"]
    assert answer.events()[-1] == "[DONE]"
    row = only_row(hall, runner)
    assert row.finish_reason == "engine_gone"
    assert row.num_completion_tokens == len(texts_of(answer).split()) == 5
    refused = runner.run(hall.chat())
    assert (refused.status, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert "retry-after" in refused.headers
    runner.run(reconnect(hall, worker.path))
    assert runner.run(hall.chat(max_tokens=2)).status == 200
    runner.run(hall.check_books())


def test_a_killed_worker_makes_a_whole_answer_free(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make()
    worker.scripts.append(Script(die_after=1))
    worker.model = LONG
    answer = runner.run(hall.chat(max_tokens=50))
    assert (answer.status, answer.json()["error"]["code"]) == (503, "engine_gone")
    assert only_row(hall, runner).amount_nano_usd == 0
    runner.run(hall.check_books())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("code", "status"),
    [("busy", 503), ("draining", 503), ("closed", 503), ("isolation_violation", 500), ("engine_failure", 502)],
)
def test_an_early_engine_error_has_its_own_status(
    stage: Stage, runner: asyncio.Runner, stream: bool, code: str, status: int
) -> None:
    hall, worker = stage.make()
    worker.scripts.append(Script(error_after=(0, code)))
    answer = runner.run(hall.chat(stream=stream))
    assert answer.status == status
    assert ("retry-after" in answer.headers) == (status == 503)
    assert only_row(hall, runner).amount_nano_usd == 0
    runner.run(hall.check_books())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_pays_for_what_was_produced(stage: Stage, runner: asyncio.Runner, stream: bool) -> None:
    hall, worker = stage.make()
    worker.model = LONG

    async def scenario() -> Answer:
        worker.scripts.append(Script(delay_s=0.005))
        body = chat_body("integer", stream=stream, max_tokens=200)
        call = hall.prepare("POST", "/v1/chat/completions", body)
        worker.on_token = lambda _, num_tokens: call.leave_at.set() if num_tokens == 6 else None
        return await call.run(hall.app)

    answer = runner.run(scenario())
    assert not answer.complete
    runner.run(hall.check_books())
    row, counts = only_row(hall, runner), next(iter(worker.counts.values()))
    assert row.finish_reason == "client_gone"
    assert 6 <= row.num_completion_tokens == counts.num_completion_tokens <= 9
    assert worker.aborted


def test_a_client_that_reads_nothing_is_cut_off(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make(send_timeout_s=0.2)
    worker.model = LONG
    worker.scripts.append(Script(delay_s=0.02))
    answer = runner.run(hall.chat(max_tokens=200, stream=True, stall_after=500))
    assert not answer.complete
    runner.run(hall.check_books())
    row, counts = only_row(hall, runner), next(iter(worker.counts.values()))
    assert row.finish_reason == "client_slow"
    assert 0 < row.num_completion_tokens == counts.num_completion_tokens < 200


def test_a_worker_that_does_not_answer_an_abort_is_not_waited_for(
    stage: Stage, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "FINAL_COUNTS_S", 0.1)
    hall, worker = stage.make()
    worker.model = LONG
    worker.scripts.append(Script(hang_after=3, deaf=True))
    runner.run(hall.chat(max_tokens=20, stream=True, leave_after=700))
    runner.run(hall.check_books())
    assert only_row(hall, runner).num_completion_tokens == 3


def test_an_answer_that_takes_too_long_is_broken_off(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make(hold_ttl_s=1)
    worker.model = LONG
    worker.scripts += [Script(hang_after=2), Script(hang_after=2)]

    async def both() -> tuple[Answer, Answer]:
        return await asyncio.gather(hall.chat(max_tokens=20, stream=True), hall.chat(max_tokens=20))

    streamed, whole = runner.run(both())
    assert errors_of(streamed) == ["deadline_exceeded"]
    assert (whole.status, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
    runner.run(hall.check_books())
    assert sorted(r.num_completion_tokens for r in runner.run(hall.usage_rows()).values()) == [0, 2]


def test_an_idle_stream_gets_heartbeats(stage: Stage, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "HEARTBEAT_S", 0.05)
    hall, worker = stage.make()
    worker.scripts.append(Script(delay_s=0.2))
    answer = runner.run(hall.chat(max_tokens=2, stream=True))
    assert answer.body.count(b": heartbeat\n\n") >= 2
    assert answer.events()[0]["choices"][0]["delta"]["role"] == "assistant"
    assert answer.events()[-1] == "[DONE]"
    runner.run(hall.check_books())


def test_leases_are_renewed_while_a_stream_lives(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make(lease_ttl_s=1)
    worker.model = LONG
    worker.scripts.append(Script(delay_s=0.1))

    async def scenario() -> tuple[int, Answer]:
        task = asyncio.create_task(hall.chat(max_tokens=20, stream=True))
        await asyncio.sleep(1.5)
        return await hall.leases(), await task

    num_leases, answer = runner.run(scenario())
    assert num_leases > 0
    assert answer.complete
    runner.run(hall.check_books())
    assert runner.run(hall.leases()) == 0


def test_without_a_database_nothing_is_served(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make()
    hall.database.down = True
    answer = runner.run(hall.chat())
    ready = runner.run(hall.call("GET", "/readyz", tenant=None))
    hall.database.down = False
    assert (answer.status, answer.json()["error"]["code"]) == (503, "database_unavailable")
    assert answer.headers["retry-after"] == "1"
    assert ready.status == 503
    assert not ready.json()["checks"]["database"]["ok"]
    hall.database.faults[:] = ["before"]
    assert runner.run(hall.chat()).status == 503
    assert not worker.submits
    runner.run(hall.check_books())
    assert runner.run(hall.leases()) == 0


def test_a_database_that_is_away_at_the_end_is_insisted_on(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make()
    hall.database.faults[:] = ["none", "before", "before", "after"]
    answer = runner.run(hall.chat(max_tokens=4, stream=True))
    assert answer.complete
    runner.run(hall.check_books())
    assert only_row(hall, runner).num_completion_tokens == next(iter(worker.counts.values())).num_completion_tokens


def test_without_valkey_nothing_is_served(tmp_path: Path, short_folder: Path, runner: asyncio.Runner) -> None:
    from tests.fakes.byte_model import write_byte_model

    async def scenario() -> tuple[Answer, Answer, int]:
        worker = IntegerWorker(short_folder / "no-valkey.sock")
        await worker.start()
        redis = connect_redis(f"unix://{short_folder / 'nobody.sock'}")
        model = write_byte_model(tmp_path / "model")
        async with open_hall(tmp_path, redis, model, worker.path, world=world()) as hall:
            answer = await hall.chat()
            ready = await hall.call("GET", "/readyz", tenant=None)
            await hall.check_books()
        await redis.aclose()
        await worker.stop()
        return answer, ready, len(worker.submits)

    answer, ready, num_submits = runner.run(scenario())
    assert (answer.status, answer.json()["error"]["code"]) == (503, "quota_unavailable")
    assert answer.headers["retry-after"] == "1"
    assert (ready.status, ready.json()["checks"]["redis"]["ok"]) == (503, False)
    assert num_submits == 0


def test_a_slow_body_is_refused(stage: Stage, runner: asyncio.Runner) -> None:
    hall, _ = stage.make()
    services = hall.services
    edge = Edge(hall.app.router, services.settings, services.world, services.metrics, body_timeout_s=0.1)
    call = hall.prepare("POST", "/v1/chat/completions", chunks=[b"{"], stall_body=True)
    answer = runner.run(call.run(edge))
    assert (answer.status, answer.headers["connection"]) == (408, "close")


def test_a_bug_of_ours_is_opaque_and_settled(
    stage: Stage, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hall, worker = stage.make()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr("gateway.api.chat.ChatShape.whole", broken)
    monkeypatch.setattr("gateway.api.chat.ChatShape.closing", broken)
    whole, streamed = runner.run(hall.chat(max_tokens=3)), runner.run(hall.chat(max_tokens=3, stream=True))
    assert whole.status == 500
    assert whole.json()["error"]["code"] == "internal_error"
    assert whole.headers["x-request-id"] in whole.json()["error"]["message"]
    assert errors_of(streamed) == ["internal_error"]
    assert b"secret" not in whole.body + streamed.body
    assert len(worker.submits) == 2
    runner.run(hall.check_books())


def test_shutdown_settles_what_it_cuts(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make()
    worker.model = LONG

    async def scenario() -> None:
        worker.scripts.append(Script(hang_after=4))
        seen = asyncio.Event()
        task = asyncio.create_task(
            hall.chat(
                max_tokens=20,
                stream=True,
                on_sent=lambda answer: seen.set() if len(texts_of(answer).split()) == 4 else None,
            )
        )
        await seen.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert hall.settler.num_open <= 1
        assert await hall.settler.drain(5) == 0

    runner.run(scenario())
    runner.run(hall.check_books())
    row = only_row(hall, runner)
    assert (row.finish_reason, row.num_completion_tokens) == ("shutdown", 4)
    assert worker.aborted or worker.counts[row.request_id].num_completion_tokens == 4


def test_nothing_is_the_zero_of_usage() -> None:
    assert (NOTHING.num_prompt_tokens, NOTHING.num_cached_tokens, NOTHING.num_completion_tokens) == (0, 0, 0)
