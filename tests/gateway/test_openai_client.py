"""The official client, over TLS that it verifies, against uvicorn and a real engine worker with a random model."""

import asyncio
import json
import math
import re
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from redis.asyncio import Redis

from engine.journal import read_journals
from gateway.host.https import https_server
from gateway.host.port import bind
from gateway.host.tls import TlsFiles, ensure_certificates
from tests.fakes.hall import Hall, open_hall, world

ROOT = Path(__file__).parents[2]
MODEL = "tiny"


@dataclass
class Site:
    hall: Hall
    url: str
    tls: TlsFiles
    journal_dir: Path

    @asynccontextmanager
    async def http(self, tenant: str | None = "acme") -> AsyncIterator[httpx.AsyncClient]:
        context = ssl.create_default_context(cafile=str(self.tls.ca))
        headers = {} if tenant is None else {"authorization": f"Bearer {self.hall.accounts[tenant].secret}"}
        async with httpx.AsyncClient(verify=context, base_url=self.url, headers=headers, timeout=60) as client:
            yield client

    @asynccontextmanager
    async def client(self, tenant: str = "acme", **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
        context = ssl.create_default_context(cafile=str(self.tls.ca))
        key = options.pop("api_key", self.hall.accounts[tenant].secret)
        async with openai.AsyncOpenAI(
            api_key=key,
            base_url=self.url + "/v1",
            http_client=openai.DefaultAsyncHttpxClient(verify=context),
            **options,
        ) as client:
            yield client


@pytest.fixture(scope="module")
def site(
    runner: asyncio.Runner, redis: Redis, short_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    from tests.strategies.tiny_model import write_tiny_model

    folder = tmp_path_factory.mktemp("site")
    write_tiny_model(folder / MODEL)
    with _worker(short_folder, folder / MODEL):
        opened = _open(folder, redis, short_folder)
        yield runner.run(opened.__aenter__())
        runner.run(opened.__aexit__(None, None, None))


@contextmanager
def _worker(folder: Path, model_dir: Path) -> Iterator[None]:
    """The worker as it is served, isolation auditor included, on `folder`/engine.sock."""
    config = {
        "model_dir": str(model_dir),
        "socket_path": str(folder / "engine.sock"),
        "journal_dir": str(folder / "journal"),
        "num_blocks": 400,
        "num_threads": 1,
        "dtype": "float32",
    }
    command = [sys.executable, "-m", "gateway.worker", "--config", json.dumps(config)]
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def _open(folder: Path, redis: Redis, short_folder: Path) -> AsyncIterator[Site]:
    the_world = world()
    tls = ensure_certificates(folder / "tls", "127.0.0.1", the_world.now_ns())
    async with open_hall(folder, redis, folder / MODEL, short_folder / "engine.sock", world=the_world) as hall:
        listener = bind("127.0.0.1", 0)
        server = https_server(hall.app, tls, drain_timeout_s=2)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.listening.wait()
        port = listener.getsockname()[1]
        yield Site(hall, f"https://127.0.0.1:{port}", tls, short_folder / "journal")
        server.should_exit = True
        await serving


def question(text: str) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0.8, "seed": 7}


def test_two_tenants_at_once_streamed_and_whole(site: Site, runner: asyncio.Runner) -> None:
    async def ask(tenant: str) -> tuple[str, str, Any, Any]:
        async with site.client(tenant) as client:
            whole = await client.chat.completions.create(**question("The cat"), max_tokens=24)
            text, usage = "", None
            stream = await client.chat.completions.create(
                **question("The cat"), max_tokens=24, stream=True, stream_options={"include_usage": True}
            )
            async for chunk in stream:
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                usage = chunk.usage or usage
            return whole.choices[0].message.content or "", text, whole.usage, usage

    async def both() -> list[tuple[str, str, Any, Any]]:
        return list(await asyncio.gather(ask("acme"), ask("globex")))

    answers = runner.run(both())
    for whole, streamed, usage, stream_usage in answers:
        assert whole == streamed
        assert usage.completion_tokens == stream_usage.completion_tokens <= 24
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answers[0][0] == answers[1][0], "the same seed gives both tenants the same text"

    runner.run(site.hall.check_books())
    rows, journal = runner.run(site.hall.usage_rows()), read_journals(site.journal_dir)
    rows = {request_id: row for request_id, row in rows.items() if request_id + ".1" not in journal}
    assert {row.tenant_id for row in rows.values()} == {a.tenant_id for a in site.hall.accounts.values()}
    for request_id, row in rows.items():
        record = journal[request_id]
        assert (row.num_prompt_tokens, row.num_completion_tokens, row.finish_reason) == (
            record.num_prompt_tokens,
            record.num_completion_tokens,
            record.finish_reason,
        )


def test_completions_models_and_stop(site: Site, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        async with site.client() as client:
            assert [model.id async for model in client.models.list()] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL
            full = await client.completions.create(model=MODEL, prompt="The cat", max_tokens=40, temperature=0)
            text = full.choices[0].text
            assert text
            cut = await client.completions.create(
                model=MODEL, prompt="The cat", max_tokens=40, temperature=0, stop=[text[3:5]]
            )
            assert cut.choices[0].text == text[: text.index(text[3:5])]
            assert cut.choices[0].finish_reason == "stop"
            ids = site.hall.services.tokenizer.encode("The cat")
            by_ids = await client.completions.create(model=MODEL, prompt=ids, max_tokens=40, temperature=0)
            assert by_ids.choices[0].text == text

    runner.run(scenario())
    runner.run(site.hall.check_books())


def test_logprobs_of_several_answers_streamed_and_whole(site: Site, runner: asyncio.Runner) -> None:
    """Every token's text is where its offset says, probabilities are those of the distribution that was drawn from."""

    async def scenario() -> None:
        async with site.client() as client:
            how: dict[str, Any] = question("The cat") | {"max_tokens": 24, "n": 2, "top_p": 0.9}
            how |= {"logprobs": True, "top_logprobs": 20, "extra_body": {"top_k": 5, "ignore_eos": True}}
            whole = await client.chat.completions.create(**how)
            told: dict[int, list[Any]] = {0: [], 1: []}
            texts = {0: "", 1: ""}
            async for chunk in await client.chat.completions.create(**how, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    if choice.logprobs is not None:
                        told[choice.index] += choice.logprobs.content or []
            assert whole.choices[0].message.content != whole.choices[1].message.content
            for choice in whole.choices:
                assert choice.message.content == texts[choice.index]
                assert choice.logprobs is not None
                content = choice.logprobs.content or []
                assert [entry.model_dump() for entry in content] == [e.model_dump() for e in told[choice.index]]
                assert len(content) == 24
                for entry in content:
                    assert 1 <= len(entry.top_logprobs) <= 5, "no more than top_k keeps"
                    assert math.fsum(math.exp(top.logprob) for top in entry.top_logprobs) == pytest.approx(1)
                    assert (entry.token, entry.logprob) in [(top.token, top.logprob) for top in entry.top_logprobs]
            plain = await client.completions.create(
                model=MODEL, prompt="The cat", max_tokens=30, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
            )
            logprobs, text = plain.choices[0].logprobs, plain.choices[0].text
            assert logprobs is not None
            for token, offset in zip(logprobs.tokens or [], logprobs.text_offset or [], strict=True):
                assert "\ufffd" in token or token.startswith("<|") or text[offset:].startswith(token)
            assert [max(top.values()) for top in logprobs.top_logprobs or []] == logprobs.token_logprobs

    runner.run(scenario())
    runner.run(site.hall.check_books())


def test_an_answer_read_as_a_prompt_has_the_bits_that_it_had_as_an_answer(site: Site, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        async with site.client() as client:
            how: dict[str, Any] = question("The cat") | {"max_tokens": 24, "temperature": 0, "logprobs": True}
            answer = await client.chat.completions.create(**how, extra_body={"ignore_eos": True, "prompt_logprobs": 0})
            assert answer.choices[0].logprobs is not None
            content = answer.choices[0].logprobs.content or []
            tokenizer = site.hall.services.tokenizer
            id_of = {tokenizer.token_bytes(token_id): token_id for token_id in reversed(range(tokenizer.vocab_size))}
            prompt = tokenizer.encode_chat(how["messages"])
            whole = prompt + [id_of[bytes(entry.bytes or [])] for entry in content]
            read = await client.completions.create(model=MODEL, prompt=whole, max_tokens=1, echo=True, logprobs=2)
            told = read.choices[0].logprobs
            assert told is not None
            values = told.token_logprobs or []
            assert values[0] is None
            assert values[len(prompt) : len(whole)] == [entry.logprob for entry in content]
            scores = (answer.model_extra or {})["prompt_logprobs"]
            assert values[1 : len(prompt)] == [
                one[str(token_id)]["logprob"] for one, token_id in zip(scores[1:], prompt[1:], strict=True)
            ]
            assert read.usage is not None
            assert read.usage.prompt_tokens_details is not None
            assert (read.usage.prompt_tokens, read.usage.prompt_tokens_details.cached_tokens) == (len(whole), 0)

    runner.run(scenario())
    runner.run(site.hall.check_books())


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
        "tame": {"type": "boolean"},
    },
    "required": ["name", "legs", "tame"],
    "additionalProperties": False,
}


def test_an_answer_has_the_form_that_was_asked_for(site: Site, runner: asyncio.Runner) -> None:
    """From a random model, which would not hit any form by chance."""

    async def scenario() -> None:
        async with site.client() as client:
            how = question("The cat") | {"max_tokens": 200}
            form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
            pets = await client.chat.completions.create(
                **how, response_format=form, n=3, logprobs=True, top_logprobs=20
            )
            for choice in pets.choices:
                assert choice.finish_reason == "stop"
                pet = json.loads(choice.message.content or "")
                assert pet.keys() == SCHEMA["properties"].keys()
                assert len(pet["name"]) <= 6
                assert 0 <= pet["legs"] <= 8
                assert pet["tame"] in (True, False)
                assert choice.logprobs is not None
                first = (choice.logprobs.content or [])[0]
                assert all(top.token.startswith("{") for top in first.top_logprobs), "of what the form allows only"
            streamed = ""
            async for chunk in await client.chat.completions.create(**how, response_format=form, stream=True):
                streamed += "".join(choice.delta.content or "" for choice in chunk.choices)
            assert streamed == pets.choices[0].message.content
            for extra, pattern in (
                ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}, "[a-c]{3}-[0-9]{2}"),
                ({"structured_outputs": {"choice": ["a (b", "é\n|"]}}, re.escape("a (b") + "|" + re.escape("é\n|")),
                ({"structured_outputs": {"grammar": 'start: "x"+ "y"'}, "max_tokens": 9}, "x+y?"),
                ({"guided_regex": "(ab){2}", "min_tokens": 50}, "abab"),
                ({"guided_choice": ["yes", "no"], "ignore_eos": True}, "yes|no"),
            ):
                body = how | {"extra_body": extra}
                text = (await client.chat.completions.create(**body)).choices[0].message.content or ""
                assert re.fullmatch(pattern, text), (extra, text)

    runner.run(scenario())
    runner.run(site.hall.check_books())


def test_errors_are_the_clients_own_classes(site: Site, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        async with site.client(max_retries=0) as client:
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(**question("x") | {"model": "other"})
            assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
            assert missing.value.request_id
            assert missing.value.request_id.startswith("req_")
            with pytest.raises(openai.BadRequestError) as bad:
                await client.chat.completions.create(**question("x"), n=9)
            assert bad.value.param == "n"
        async with site.client(api_key="bk-wrong", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()

    runner.run(scenario())


def test_a_client_that_closes_its_connection_frees_the_engine(site: Site, runner: asyncio.Runner) -> None:
    async def scenario() -> str:
        async with site.http() as client:
            body = question("The cat") | {"stream": True, "max_tokens": 3_000}
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                assert response.status_code == 200
                async for line in response.aiter_lines():
                    if '"content":' in line and '"role"' not in line:
                        break
                return response.headers["x-request-id"]

    request_id = runner.run(scenario())
    runner.run(site.hall.check_books())
    row = runner.run(site.hall.usage_rows())[request_id]
    record = read_journals(site.journal_dir)[request_id]
    assert row.num_completion_tokens == record.num_completion_tokens
    if row.finish_reason != "stop":  # a random model may end by itself first
        assert (row.finish_reason, record.finish_reason) == ("client_gone", "abort")
        assert row.num_completion_tokens < 3_000


def test_limits_hold_on_a_real_connection(site: Site, runner: asyncio.Runner) -> None:
    async def scenario() -> list[httpx.Response]:
        async with site.http() as client:
            large = await client.post("/v1/chat/completions", content=b"x" * 6_000_000)
            header = await client.get("/v1/models", headers={"x-filler": "x" * 40_000})

            async def drip() -> AsyncIterator[bytes]:
                for _ in range(60):
                    yield b"x" * 100_000

            chunked = await client.post("/v1/chat/completions", content=drip())
            return [large, header, chunked, await client.get("/healthz")]

    large, header, chunked, health = runner.run(scenario())
    assert [r.status_code for r in (large, header, chunked, health)] == [413, 431, 413, 200]
    assert large.json()["error"]["code"] == "body_too_large"
