"""The API over real parts: shapes, refusals, what is charged and logged when all goes well."""

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.protocol import SamplingParams, Stats
from engine.sampling import grammar
from engine.scheduling.tiers import TIERS
from gateway.api.health import Readiness
from gateway.api.streaming import event
from gateway.clerk import Clerk
from gateway.engine_link import EngineLink, EngineStatus
from tenancy.quotas.limits import set_limits
from tests.fakes.asgi import Answer
from tests.fakes.hall import USD, Hall, chat_body
from tests.fakes.integer_worker import IntegerModel, IntegerWorker, Script, text_of
from tests.gateway.conftest import Stage
from tests.gateway.test_wire import JSON, NAMES


@pytest.fixture(scope="module")
def served(shared_stage: Stage) -> tuple[Hall, IntegerWorker]:
    return shared_stage.make(body_bytes_max=64 * 1024)


@pytest.fixture
def hall(served: tuple[Hall, IntegerWorker], runner: asyncio.Runner) -> Iterator[Hall]:
    yield served[0]
    runner.run(served[0].check_books())


@pytest.fixture
def worker(served: tuple[Hall, IntegerWorker]) -> IntegerWorker:
    return served[1]


def expected(worker: IntegerWorker) -> tuple[str, str, int]:
    """Text, finish reason and token count of the last answer, from the model itself."""
    submit = worker.submits[-1]
    tokens, reason = worker.model.answer(submit.prompt_token_ids, submit.sampling.seed, submit.sampling.max_tokens)
    return "".join(map(text_of, tokens)), reason, len(tokens)


def test_a_whole_chat_answer(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    answer = runner.run(hall.chat("hello", max_tokens=9, seed=5))
    body = answer.json()
    text, reason, num_tokens = expected(worker)
    num_prompt = len(hall.services.tokenizer.encode_chat([{"role": "user", "content": "hello"}]))
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"].startswith("req_")
    assert body["id"] == "chatcmpl-" + answer.headers["x-request-id"].removeprefix("req_")
    assert body["object"] == "chat.completion"
    assert body["system_fingerprint"].startswith("fp_")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    ("asked", "served_as"),
    [(None, "default"), ("auto", "default"), ("default", "default"), ("flex", "flex"), ("batch", "batch")],
)
def test_the_tier_that_is_asked_for_reaches_the_engine_and_is_told(
    hall: Hall, worker: IntegerWorker, runner: asyncio.Runner, asked: str | None, served_as: str
) -> None:
    whole = runner.run(hall.chat("hello", max_tokens=3, service_tier=asked)).json()
    assert whole["service_tier"] == served_as
    assert worker.submits[-1].priority == TIERS[served_as]
    *chunks, _ = runner.run(hall.chat("hello", max_tokens=3, service_tier=asked, stream=True)).events()
    assert {chunk["service_tier"] for chunk in chunks} == {served_as}


def test_nobody_goes_before_all_others_unless_the_operator_says_so(
    hall: Hall, worker: IntegerWorker, runner: asyncio.Runner, served: tuple[Hall, IntegerWorker]
) -> None:
    num_before = len(worker.submits)
    answer = runner.run(hall.chat("hello", max_tokens=3, service_tier="priority"))
    assert (answer.status, answer.json()["error"]["code"]) == (403, "service_tier_not_allowed")
    assert answer.json()["error"]["param"] == "service_tier"
    assert len(worker.submits) == num_before, "and nothing was asked of the engine"


def test_the_operator_names_who_may_use_priority(shared_stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = shared_stage.make(priority_tenants="acme, somebody")
    answer = runner.run(hall.chat("hello", max_tokens=3, service_tier="priority"))
    assert (answer.status, answer.json()["service_tier"]) == (200, "priority")
    assert worker.submits[-1].priority == TIERS["priority"]
    answer = runner.run(hall.chat("hello", tenant="globex", max_tokens=3, service_tier="priority"))
    assert answer.status == 403


def test_a_streamed_chat_answer(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    answer = runner.run(hall.chat("hello", max_tokens=9, seed=5, stream=True, stream_options={"include_usage": True}))
    *chunks, done = answer.events()
    text, reason, num_tokens = expected(worker)
    assert answer.complete
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["choices"][0] for chunk in chunks[1:-2]]
    assert all(delta["finish_reason"] is None and delta["index"] == 0 for delta in deltas)
    assert "".join(delta["delta"]["content"] for delta in deltas) == text
    assert chunks[-2]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason}]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == num_tokens


def test_a_stream_without_usage_never_mentions_it(hall: Hall, runner: asyncio.Runner) -> None:
    *chunks, done = runner.run(hall.chat(max_tokens=3, stream=True)).events()
    assert done == "[DONE]"
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("prompt", ["hello", ["hello"], [5, 6, 7], [[5, 6, 7]]])
def test_completions_take_text_and_token_ids(
    hall: Hall, worker: IntegerWorker, runner: asyncio.Runner, prompt: Any
) -> None:
    body = {"model": "integer", "prompt": prompt, "max_tokens": 6}
    whole = runner.run(hall.call("POST", "/v1/completions", body | {"seed": 1})).json()
    text, reason, _ = expected(worker)
    assert whole["object"] == "text_completion"
    assert whole["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]
    *chunks, done = runner.run(hall.call("POST", "/v1/completions", body | {"seed": 1, "stream": True})).events()
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert chunks[-1]["choices"][0]["finish_reason"] == reason


def test_every_sampling_parameter_reaches_the_engine(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    fields = {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.75,
        "seed": 3,
        "stop": "x",
        "ignore_eos": True,
        "top_k": 7,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.5,
        "frequency_penalty": 0.5,
        "logit_bias": {"5": -100, "6": 2.5},
        "stop_token_ids": [8, 9],
        "min_tokens": 2,
        "include_stop_str_in_output": True,
    }
    runner.run(hall.chat(**fields))
    expected = fields | {"stop": ("x",), "logit_bias": ((5, -100.0), (6, 2.5)), "stop_token_ids": (8, 9)}
    expected["include_stop"] = expected.pop("include_stop_str_in_output")
    assert worker.submits[-1].sampling == SamplingParams(**expected)
    runner.run(hall.chat(max_tokens=5, structured_outputs={"regex": "[ab]"}))
    assert worker.submits[-1].sampling.grammar == grammar.of_regex("[ab]")
    runner.run(hall.chat(max_tokens=5, response_format={"type": "json_object"}, structured_outputs={}))
    assert worker.submits[-1].sampling.grammar == grammar.of_schema({"type": "object"})
    runner.run(hall.chat(max_tokens=5, seed=3, top_k=-1))
    assert worker.submits[-1].sampling == SamplingParams(max_tokens=5, seed=3)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"stop_token_ids": [258]}, "stop_token_ids"),
        ({"min_tokens": 6}, "min_tokens"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}},
            "response_format",
        ),
        ({"structured_outputs": {"regex": "[a-"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: missing"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": ["é" * 10_000]}}, "structured_outputs.choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_json": {"unknownWord": 3, "not": {}}}, "guided_json"),
        ({"guided_json": {"type": "object"}, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_what_only_the_model_can_refuse(hall: Hall, runner: asyncio.Runner, change: dict[str, Any], param: str) -> None:
    answer = runner.run(hall.chat(**({"max_tokens": 5} | change)))
    assert (answer.status, answer.json()["error"]["param"]) == (400, param)


def test_the_books_agree_with_the_engine(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    worker.num_cached_tokens = 3
    answer = runner.run(hall.chat("count me", max_tokens=7, tenant="globex", stream=True))
    worker.num_cached_tokens = 0
    request_id = answer.headers["x-request-id"]
    row = runner.run(hall.usage_rows())[request_id]
    counts = worker.counts[request_id]
    account = hall.accounts["globex"]
    assert (row.tenant_id, row.project_id, row.key_id) == (account.tenant_id, account.project_id, account.key_id)
    assert row.num_prompt_tokens == counts.num_prompt_tokens
    assert row.num_cached_tokens == counts.num_cached_tokens == 3
    assert row.num_completion_tokens == counts.num_completion_tokens
    pico = (row.num_prompt_tokens - 3) * 150_000 + 3 * 75_000 + row.num_completion_tokens * 600_000 + 7_000
    assert abs(row.amount_nano_usd * 1_000 - pico) <= 500
    assert row.stream
    assert row.finish_reason == counts.finish_reason
    assert runner.run(hall.leases()) == 0


def test_tenants_are_domains_with_salts_of_their_own(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    async def salts() -> list[tuple[str, bytes]]:
        for tenant, more in (("acme", {}), ("globex", {}), ("acme", {"cache_salt": "team"}), ("acme", {})):
            await hall.chat(tenant=tenant, max_tokens=1, **more)
        return [(submit.domain, submit.cache_salt) for submit in worker.submits[-4:]]

    acme, globex, team, again = runner.run(salts())
    assert acme[0] == hall.accounts["acme"].tenant_id
    assert globex[0] == hall.accounts["globex"].tenant_id
    assert acme == again
    assert len({acme[1], globex[1], team[1]}) == 3
    assert team[0] == acme[0]


def test_without_a_seed_each_request_has_its_own(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    async def twice() -> None:
        await asyncio.gather(hall.chat(max_tokens=1, seed=None), hall.chat(max_tokens=1, seed=None))

    runner.run(twice())
    assert len({submit.sampling.seed for submit in worker.submits[-2:]}) == 2
    runner.run(hall.chat(max_tokens=1, seed=-1))
    assert worker.submits[-1].sampling.seed >= 0


def test_the_default_and_the_room_bound_max_tokens(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    runner.run(hall.chat("x" * 200))
    submit = worker.submits[-1]
    assert submit.sampling.max_tokens == 256 - len(submit.prompt_token_ids)


def problem(answer: Answer) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    assert answer.headers["x-request-id"].startswith("req_")
    return answer.status, error["param"], error["code"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "other"}, (404, "model", "model_not_found")),
        ({"messages": []}, (400, "messages", "invalid_value")),
        ({"max_tokens": 0}, (400, "max_tokens", "invalid_value")),
        ({"max_tokens": 300}, (400, "max_tokens", "context_length_exceeded")),
        ({"max_completion_tokens": 300}, (400, "max_completion_tokens", "context_length_exceeded")),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, (400, "messages", "context_length_exceeded")),
        ({"messages": [{"role": "user", "content": "x" * 30_000}]}, (400, "messages", "context_length_exceeded")),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            (400, "messages", "invalid_value"),
        ),
        ({"n": 9}, (400, "n", "invalid_value")),
    ],
)
def test_bad_chat_requests(
    hall: Hall, runner: asyncio.Runner, fields: dict[str, Any], expected: tuple[int, str, str]
) -> None:
    before = runner.run(hall.num_rows())
    answer = runner.run(hall.call("POST", "/v1/chat/completions", chat_body("integer") | fields))
    assert problem(answer) == expected
    assert runner.run(hall.num_rows()) == before


@pytest.mark.parametrize("prompt", ["", [258], [-1], [10**20], [[]], "x" * 256])
def test_bad_prompts(hall: Hall, runner: asyncio.Runner, prompt: Any) -> None:
    answer = runner.run(hall.call("POST", "/v1/completions", {"model": "integer", "prompt": prompt}))
    assert problem(answer)[:2] == (400, "prompt")


def test_a_wrong_key_has_one_answer(hall: Hall, runner: asyncio.Runner) -> None:
    secret = hall.accounts["acme"].secret
    presented = (
        None,
        "",
        "Bearer",
        "Bearer x",
        f"Basic {secret}",
        f"Bearer {secret}x",
        f"Bearer {secret[:-1]}",
        secret,
    )

    async def ask(authorization: str | None) -> Answer:
        headers = {} if authorization is None else {"authorization": authorization}
        return await hall.call("POST", "/v1/chat/completions", chat_body("integer"), tenant=None, headers=headers)

    answers = [runner.run(ask(value)) for value in presented]
    assert {answer.body for answer in answers} == {answers[0].body}
    assert {problem(answer) for answer in answers} == {(401, None, "invalid_api_key")}
    assert all(answer.headers["www-authenticate"].startswith("Bearer") for answer in answers)


def test_nothing_is_read_of_a_stranger(hall: Hall, runner: asyncio.Runner) -> None:
    answer = runner.run(hall.call("POST", "/v1/chat/completions", tenant=None, chunks=[b"{"], stall_body=True))
    assert answer.status == 401


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_listed_does_not_exist(
    hall: Hall, runner: asyncio.Runner, method: str, path: str, status: int, code: str
) -> None:
    answer = runner.run(hall.call(method, path))
    assert problem(answer)[::2] == (status, code)
    assert ("allow" in answer.headers) == (status == 405)


def test_models(hall: Hall, runner: asyncio.Runner) -> None:
    listed = runner.run(hall.call("GET", "/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["integer"]
    assert runner.run(hall.call("GET", "/v1/models/integer")).json() == listed["data"][0]
    assert runner.run(hall.call("GET", "/v1/models", tenant=None)).status == 401


def test_health(hall: Hall, runner: asyncio.Runner) -> None:
    assert runner.run(hall.call("GET", "/healthz", tenant=None)).json() == {"status": "ok"}
    ready = runner.run(hall.call("GET", "/readyz", tenant=None))
    assert ready.status == 200
    checks = ready.json()["checks"]
    assert all(check["ok"] for check in checks.values())
    assert (checks["engine"]["isolation"], checks["engine"]["kernels"]) == ("relaxed", "arithmetic")
    assert checks["engine"]["epoch"] == "epoch-1"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, (True, False, False)),
        ({"closed": True}, (False, True, False)),
        ({"audit": {"num_self_tests": 2, "num_self_tests_failed": 1}}, (False, False, True)),
    ],
)
def test_a_closed_or_blind_engine_is_not_ready(
    hall: Hall, change: dict[str, Any], found: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = EngineStatus("ready", 0, None, replace(Stats(0, 0, 0, 64, 64, {}, 0, 0, 0, {}), **change))
    monkeypatch.setattr(EngineLink, "status", status)
    engine = Readiness(hall.services)._engine()
    assert (engine["ok"], engine["closed"], engine["audit_blind"]) == found


@pytest.mark.parametrize(("audit", "head"), [({}, "not witnessed"), ({"head_is_witnessed": 1}, "witnessed")])
def test_a_head_that_nobody_witnesses_is_said(
    hall: Hall, audit: dict[str, int], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = EngineStatus("ready", 0, None, replace(Stats(0, 0, 0, 64, 64, {}, 0, 0, 0, {}), audit=audit))
    monkeypatch.setattr(EngineLink, "status", status)
    assert Readiness(hall.services)._engine()["head"] == head


def test_bodies_and_headers_are_bounded(hall: Hall, runner: asyncio.Runner) -> None:
    path = "/v1/chat/completions"
    declared = runner.run(hall.call("POST", path, b"{}", headers={"content-length": "65537"}))
    chunked = runner.run(hall.call("POST", path, chunks=[b"x" * 40_000, b"x" * 40_000, b"x"]))
    headers = runner.run(hall.call("POST", path, b"{}", headers={"x-filler": "x" * 40_000}))
    assert (declared.status, chunked.status, headers.status) == (413, 413, 431)
    assert {a.headers["connection"] for a in (declared, chunked, headers)} == {"close"}
    assert chunked.complete


def test_a_clients_request_id_is_not_trusted(hall: Hall, runner: asyncio.Runner) -> None:
    answer = runner.run(hall.call("GET", "/healthz", headers={"x-request-id": "mine"}))
    assert answer.headers["x-request-id"] != "mine"


def test_a_limit_in_shadow_serves_and_tells(stage: Stage, runner: asyncio.Runner) -> None:
    hall, _ = stage.make()

    async def scenario() -> None:
        tenant_id = hall.accounts["acme"].tenant_id
        only: Any = {"requests_per_minute": 1, "tokens_per_day": 100, "shadow": frozenset({"requests_per_minute"})}
        async with hall.services.database.transaction() as conn:
            await set_limits(conn, "tenant", tenant_id, now_ns=1, **only)
        first, second = await hall.chat(max_tokens=2), await hall.chat(max_tokens=2)
        assert (first.status, second.status) == (200, 200)
        assert "x-bulkhead-would-refuse" not in first.headers
        assert second.headers["x-bulkhead-would-refuse"] == "requests_per_minute"
        assert "x-ratelimit-limit-requests" not in second.headers
        (entry,) = await hall.outbox("limit.would_refuse")
        assert entry == {
            "request_id": second.headers["x-request-id"],
            "scope_id": tenant_id,
            "limit_name": "requests_per_minute",
        }
        line = 'bulkhead_would_refuse_total{limit="requests_per_minute",tenant="acme"} 1.0'
        assert line in hall.services.metrics.render().decode()
        never = await hall.chat(max_tokens=150)
        assert problem(never) == (400, "max_tokens", "request_never_fits")
        assert "100 per day" in never.json()["error"]["message"]

    runner.run(scenario())


def test_limits_refuse_and_say_when(shared_stage: Stage, runner: asyncio.Runner) -> None:
    hall, _ = shared_stage.make()

    async def limit(**limits: int) -> None:
        async with hall.services.database.transaction() as conn:
            await set_limits(conn, "tenant", hall.accounts["acme"].tenant_id, now_ns=1, **limits)

    runner.run(limit(requests_per_minute=2, tokens_per_minute=1_000))
    first, second, third = (runner.run(hall.chat(max_tokens=2)) for _ in range(3))
    assert (first.status, second.status) == (200, 200)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert problem(third) == (429, None, "rate_limit_exceeded")
    assert int(third.headers["retry-after-ms"]) <= 1_000 * int(third.headers["retry-after"]) <= 60_000
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert runner.run(hall.chat(max_tokens=2, tenant="globex")).status == 200
    for free in (hall.call("GET", "/v1/models"), hall.chat(n=2), hall.chat(temperature=9)):
        assert runner.run(free).headers["x-ratelimit-limit-requests"] == "2"

    runner.run(limit(tokens_per_minute=50))
    assert problem(runner.run(hall.chat(max_tokens=200))) == (400, "max_tokens", "request_never_fits")
    runner.run(limit(requests_per_minute=0))
    shut = runner.run(hall.chat(max_tokens=2))
    assert problem(shut) == (429, None, "rate_limit_exceeded")
    assert shut.headers["x-should-retry"] == "false"
    runner.run(hall.check_books())


def test_a_tenants_weight_reaches_the_engine(shared_stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = shared_stage.make()

    async def weigh(weight: int) -> None:
        async with hall.services.database.transaction() as conn:
            clerk = Clerk(conn, os.urandom, 1)
            await clerk.set_limits("tenant", hall.accounts["acme"].tenant_id, None, None, None, weight)

    runner.run(weigh(3))
    assert runner.run(hall.chat(max_tokens=2, n=2)).status == 200
    assert runner.run(hall.chat(max_tokens=2, tenant="globex")).status == 200
    assert [submit.weight for submit in worker.submits[-3:]] == [3, 3, 1]
    assert [entry["weight"] for entry in runner.run(hall.outbox("limits.changed"))] == [3]


def test_concurrency_has_its_own_code(shared_stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = shared_stage.make()
    worker.model = IntegerModel(eos_every=1_000_003)  # no answer ends by itself

    async def scenario() -> list[Answer]:
        async with hall.services.database.transaction() as conn:
            await set_limits(conn, "tenant", hall.accounts["acme"].tenant_id, concurrency_max=1, now_ns=1)
        running = asyncio.Event()
        worker.on_token = lambda *_: running.set()
        worker.scripts.append(Script(delay_s=0.05))
        first = asyncio.create_task(hall.chat(max_tokens=5))
        await running.wait()
        second = await hall.chat(max_tokens=5)
        return [await first, second, await hall.chat(max_tokens=5)]

    first, second, third = runner.run(scenario())
    assert (first.status, third.status) == (200, 200)
    assert problem(second) == (429, None, "concurrency_limit_exceeded")
    assert second.headers["retry-after"] == "1"
    runner.run(hall.check_books())


def test_spent_credit_is_final_and_held_credit_is_not(shared_stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = shared_stage.make(credit_nano_usd=30 * USD, output_pico_usd=10**12)  # one USD a token

    async def scenario() -> list[Answer]:
        worker.model = IntegerModel(eos_every=1_000_003)  # no answer ends by itself
        running = asyncio.Event()
        worker.on_token = lambda *_: running.set()
        worker.scripts.append(Script(delay_s=0.05))
        first = asyncio.create_task(hall.chat(max_tokens=30, stream=True))
        await running.wait()
        assert (await hall.credit()).held_nano_usd >= 29 * USD
        second = await hall.chat(max_tokens=20)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await hall.settler.drain(5)
        last = await hall.chat(max_tokens=100)
        assert last.headers["x-bulkhead-budget"] == f"credit; max_tokens={last.json()['usage']['completion_tokens']}"
        assert last.json()["choices"][0]["finish_reason"] == "length"
        return [second, await hall.chat(max_tokens=100)]

    held, spent = runner.run(scenario())
    assert problem(held) == (429, None, "credit_on_hold")
    assert held.headers["retry-after"] == "1"
    assert problem(spent) == (429, None, "insufficient_quota")
    assert spent.json()["error"]["type"] == "insufficient_quota"
    assert spent.headers["x-should-retry"] == "false"
    runner.run(hall.check_books())


@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
    value=JSON | st.fixed_dictionaries({"model": st.just("integer")}, optional=dict.fromkeys(NAMES, JSON)),
)
def test_no_json_whatever_is_a_fault_of_ours(
    served: tuple[Hall, IntegerWorker], runner: asyncio.Runner, path: str, value: Any
) -> None:
    body = json.dumps(value).encode("utf-8", "surrogatepass")
    answer = runner.run(served[0].call("POST", path, body))
    assert answer.status in (200, 400, 404)
    if answer.status != 200:
        problem(answer)


@given(st.recursive(st.text() | st.none() | st.integers(), lambda inner: st.dictionaries(st.text(), inner)))
def test_any_payload_is_one_event(payload: Any) -> None:
    frame = event(payload)
    lines = frame.decode().split("\n")
    assert lines[1:] == ["", ""]
    assert json.loads(lines[0].removeprefix("data: ")) == payload
