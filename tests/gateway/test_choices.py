"""Several answers to one request, and log probabilities: shapes, exact counts, and every ending of n sequences."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import astuple
from redis.asyncio import Redis

from gateway.sequences import request_id_of, sequence_id, together
from tenancy.usage.meter import Usage
from tests.fakes.byte_model import write_byte_model
from tests.fakes.hall import USD, Hall, open_hall, world
from tests.fakes.integer_worker import (
    EOS,
    IntegerModel,
    IntegerWorker,
    Script,
    logprob_of,
    pretended,
    prompt_logprobs_of,
    text_of,
)
from tests.gateway.conftest import Stage


@pytest.fixture(scope="module")
def served(shared_stage: Stage) -> tuple[Hall, IntegerWorker]:
    return shared_stage.make()


@pytest.fixture
def hall(served: tuple[Hall, IntegerWorker], runner: asyncio.Runner) -> Iterator[Hall]:
    yield served[0]
    runner.run(served[0].check_books())


@pytest.fixture
def worker(served: tuple[Hall, IntegerWorker]) -> IntegerWorker:
    return served[1]


def expected(worker: IntegerWorker, num: int) -> list[tuple[str, str, list[int]]]:
    """Text, finish reason and tokens of the last request's answers."""
    found = []
    for submit in worker.submits[-num:]:
        tokens, reason = worker.model.answer(submit.prompt_token_ids, submit.sampling.seed, submit.sampling.max_tokens)
        found.append(("".join(map(text_of, tokens)), reason, tokens))
    return found


def streamed(events: list[Any]) -> dict[int, list[dict[str, Any]]]:
    """The choices of a stream's chunks by index."""
    found: dict[int, list[dict[str, Any]]] = {}
    for chunk in events:
        for choice in chunk.get("choices", ()) if isinstance(chunk, dict) else ():
            found.setdefault(choice["index"], []).append(choice)
    return found


def test_each_answer_has_its_seed_and_the_prompt_counts_once(
    hall: Hall, worker: IntegerWorker, runner: asyncio.Runner
) -> None:
    answer = runner.run(hall.chat("several", n=3, max_tokens=9, seed=5))
    body, answers = answer.json(), expected(worker, 3)
    request_id = answer.headers["x-request-id"]
    names = [submit.sequence_id for submit in worker.submits[-3:]]
    assert names == [request_id, request_id + ".1", request_id + ".2"]
    assert len({submit.sampling.seed for submit in worker.submits[-3:]}) == 3
    assert worker.submits[-3].sampling.seed == 5
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    for choice, (text, reason, _) in zip(body["choices"], answers, strict=True):
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)
    row = runner.run(hall.usage_rows())[request_id]
    num_prompt = len(worker.submits[-1].prompt_token_ids)
    num_completion = sum(len(tokens) for *_, tokens in answers)
    assert (row.num_prompt_tokens, row.num_completion_tokens) == (num_prompt, num_completion)
    assert body["usage"]["total_tokens"] == num_prompt + num_completion
    assert row.finish_reason == ("length" if any(reason == "length" for _, reason, _ in answers) else "stop")


def test_what_all_answers_took_is_on_the_row_however_they_end(
    hall: Hall, worker: IntegerWorker, runner: asyncio.Runner
) -> None:
    def on_row(answer: Any) -> tuple[int | None, ...]:
        runner.run(hall.settler.drain(5))
        row = runner.run(hall.usage_rows())[answer.headers["x-request-id"]]
        return (row.engine_ns, row.block_ns, row.num_prefill_tokens, row.num_recomputed_tokens, row.num_decode_steps)

    def took(num: int) -> tuple[int, ...]:
        counts = [worker.counts[submit.sequence_id] for submit in worker.submits[-num:]]
        return tuple(map(sum, zip(*(astuple(pretended(one)) for one in counts), strict=True)))

    assert on_row(runner.run(hall.chat("whole", n=3, max_tokens=9, seed=5))) == took(3)
    left = runner.run(hall.chat("left", n=2, max_tokens=200, seed=6, stream=True, leave_after=3))
    assert on_row(left) == took(2)
    worker.scripts.append(Script(error_after=(4, "engine_failure")))
    broken = runner.run(hall.chat("broken", max_tokens=20, seed=3))
    assert broken.status >= 500
    assert on_row(broken) == took(1)  # nothing is charged, and yet it took that
    worker.measures = False
    assert on_row(runner.run(hall.chat("unmeasured", max_tokens=3))) == (None,) * 5
    worker.measures = True


@pytest.mark.parametrize("withhold", [0, 3])
def test_streamed_answers_are_the_whole_ones(
    hall: Hall, worker: IntegerWorker, runner: asyncio.Runner, withhold: int
) -> None:
    fields = {"n": 2, "max_tokens": 12, "seed": 8, "logprobs": True, "top_logprobs": 2}
    worker.scripts[:] = [Script(withhold=withhold)] * 4
    whole = runner.run(hall.chat(**fields)).json()
    answer = runner.run(hall.chat(**fields, stream=True, stream_options={"include_usage": True}))
    *chunks, done = answer.events()
    assert done == "[DONE]"
    assert chunks[-1]["usage"] == whole["usage"]
    for index, parts in streamed(chunks).items():
        choice = whole["choices"][index]
        assert parts[0]["delta"]["role"] == "assistant"
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        told = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"]


def test_chat_logprobs(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    answer = runner.run(hall.chat(max_tokens=9, seed=5, logprobs=True, top_logprobs=2)).json()
    [(_, _, tokens)] = expected(worker, 1)
    content = answer["choices"][0]["logprobs"]["content"]
    shown = [token for token in tokens if token != EOS]
    assert [entry["logprob"] for entry in content] == [-(token % 8) / 8 for token in shown]
    decode = hall.services.tokenizer.token_bytes
    assert [entry["bytes"] for entry in content] == [list(decode(token)) for token in shown]
    for entry, token in zip(content, shown, strict=True):
        assert entry["token"] == decode(token).decode("utf-8", "replace")
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-(token % 8) / 8, -9.0]
    bare = runner.run(hall.chat(max_tokens=4, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in bare)
    assert runner.run(hall.chat(max_tokens=4, logprobs=False)).json()["choices"][0]["logprobs"] is None


def test_completion_logprobs_and_echo(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    body = {"model": "integer", "prompt": "hello", "max_tokens": 9, "seed": 5}
    told = runner.run(hall.call("POST", "/v1/completions", body | {"logprobs": 1})).json()["choices"][0]
    [(text, _, tokens)] = expected(worker, 1)
    shown = [token for token in tokens if token != EOS]
    logprobs = told["logprobs"]
    assert [len(logprobs[name]) for name in sorted(logprobs)] == [len(shown)] * 4
    assert logprobs["token_logprobs"] == [logprob_of(token, 0, 0).logprob for token in shown]
    assert logprobs["text_offset"] == [sum(map(len, map(text_of, shown[:i]))) for i in range(len(shown))]
    assert all(len(top) == 1 for top in logprobs["top_logprobs"])
    echo = runner.run(hall.call("POST", "/v1/completions", body | {"echo": True})).json()["choices"][0]
    assert echo["text"] == "hello" + text
    by_ids = body | {"prompt": [105, 106], "echo": True, "stream": True}
    chunks = runner.run(hall.call("POST", "/v1/completions", by_ids)).events()
    [parts] = streamed(chunks).values()
    assert "".join(part["text"] for part in parts) == hall.services.tokenizer.decode([105, 106]) + "".join(
        text for text, *_ in expected(worker, 1)
    )


PROMPTS = ["héllo", [105, 196, 106, 107], [105]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_echoed_prompt_with_its_log_probabilities(
    hall: Hall, worker: IntegerWorker, runner: asyncio.Runner, prompt: Any
) -> None:
    """Once from the engine, in every answer; the same streamed and whole."""
    body = {"model": "integer", "prompt": prompt, "max_tokens": 7, "seed": 5, "n": 2, "echo": True, "logprobs": 1}
    whole = runner.run(hall.call("POST", "/v1/completions", body)).json()["choices"]
    assert [submit.sampling.prompt_logprobs for submit in worker.submits[-2:]] == [1, -1]
    tokenizer, asked = hall.services.tokenizer, worker.submits[-2].prompt_token_ids
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    own = [one.logprob for one in prompt_logprobs_of(asked, 1)]
    for choice, (answer, _, tokens) in zip(whole, expected(worker, 2), strict=True):
        shown = [token for token in tokens if token != EOS]
        told = choice["logprobs"]
        assert choice["text"] == text + answer
        assert [len(values) for values in told.values()] == [len(asked) + len(shown)] * 4
        assert told["token_logprobs"] == [None, *own, *(logprob_of(token, 0, 0).logprob for token in shown)]
        assert told["top_logprobs"][0] is None
        assert all(len(top) == 1 for top in told["top_logprobs"][1:])
        assert told["text_offset"] == sorted(told["text_offset"])
        for token, offset in zip(told["tokens"], told["text_offset"][: len(asked)], strict=False):
            assert "\ufffd" in token or text[offset:].startswith(token)
        assert told["text_offset"][len(asked) :][:1] == [len(text)][: len(shown)]
    chunks = runner.run(hall.call("POST", "/v1/completions", body | {"stream": True})).events()
    for index, parts in streamed(chunks).items():
        assert "".join(part["text"] for part in parts) == whole[index]["text"]
        for name in whole[index]["logprobs"]:
            told = [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
            assert told == whole[index]["logprobs"][name]


def test_prompt_logprobs_as_vllm_has_them(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    prompt = hall.services.tokenizer.encode("hi")
    body = {"model": "integer", "prompt": prompt, "max_tokens": 4, "seed": 5}
    fields = {"echo": True, "logprobs": 1, "prompt_logprobs": 2}
    answer = runner.run(hall.call("POST", "/v1/completions", body | fields)).json()
    assert worker.submits[-1].sampling.prompt_logprobs == 2
    [choice] = answer["choices"]
    [first, second] = choice["prompt_logprobs"]
    [told] = prompt_logprobs_of(prompt, 2)
    assert first is None
    decoded = hall.services.tokenizer.token_bytes
    assert second == {
        str(prompt[1]): {"logprob": told.logprob, "rank": 1, "decoded_token": "i"},
        "1": {"logprob": -9.0, "rank": 2, "decoded_token": decoded(1).decode("utf-8", "replace")},
    }
    assert list(choice["logprobs"]["top_logprobs"][1].values()) == [told.logprob], "echo keeps to logprobs"
    chat = runner.run(hall.chat(max_tokens=4, prompt_logprobs=0)).json()
    asked = worker.submits[-1].prompt_token_ids
    own = prompt_logprobs_of(asked, 0)
    assert [list(one.values()) for one in chat["prompt_logprobs"][1:]] == [
        [{"logprob": one.logprob, "rank": one.rank, "decoded_token": decoded(one.token_id).decode("utf-8", "replace")}]
        for one in own
    ]
    for plain in (runner.run(hall.chat(max_tokens=4)).json(), answer):
        assert "prompt_logprobs" not in plain
    quiet = runner.run(hall.call("POST", "/v1/completions", body | {"echo": True})).json()["choices"][0]
    assert (quiet["logprobs"], "prompt_logprobs" in quiet) == (None, False)


def test_a_client_that_leaves_stops_every_answer(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    worker.scripts[:] = [Script(hang_after=4), Script(hang_after=2), Script(hang_after=1)]
    model = worker.model
    worker.model = IntegerModel(eos_every=1_000_003)
    answer = runner.run(hall.chat(n=3, max_tokens=50, stream=True, leave_after=5))
    runner.run(hall.check_books())
    worker.model = model
    request_id = answer.headers["x-request-id"]
    names = [sequence_id(request_id, index) for index in range(3)]
    begun = [name for name in names if name in worker.counts]
    assert set(begun) <= set(worker.aborted)
    row = runner.run(hall.usage_rows())[request_id]
    assert row.finish_reason == "client_gone"
    assert row.num_completion_tokens == sum(worker.counts[name].num_completion_tokens for name in begun)


def test_one_broken_answer_ends_the_request(hall: Hall, worker: IntegerWorker, runner: asyncio.Runner) -> None:
    worker.scripts[:] = [Script(delay_s=0.01), Script(error_after=(2, "engine_failure")), Script(delay_s=0.01)]
    model = worker.model
    worker.model = IntegerModel(eos_every=1_000_003)
    answer = runner.run(hall.chat(n=3, max_tokens=50))
    runner.run(hall.check_books())
    worker.model = model
    assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_failure")
    request_id = answer.headers["x-request-id"]
    assert runner.run(hall.usage_rows())[request_id].num_completion_tokens == 0


def test_a_lost_worker_charges_what_was_sent(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make()
    worker.model = IntegerModel(eos_every=1_000_003)
    worker.scripts[:] = [Script(withhold=50, delay_s=0.005), Script(die_after=6, delay_s=0.005)]
    answer = runner.run(hall.chat(n=2, max_tokens=40, stream=True))
    runner.run(hall.check_books())
    row = runner.run(hall.usage_rows())[answer.headers["x-request-id"]]
    sent = sum(
        len(part["delta"].get("content", "").split()) for one in streamed(answer.events()).values() for part in one
    )
    assert row.finish_reason == "engine_gone"
    assert row.num_completion_tokens == sent > 0


def test_the_last_credit_is_shared_out_to_the_last_token(
    runner: asyncio.Runner, redis: Redis, short_folder: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        worker = IntegerWorker(short_folder / "choices.sock", model=IntegerModel(eos_every=1_000_003))
        await worker.start()
        model = write_byte_model(tmp_path / "model")
        how = {"credit_nano_usd": 61 * USD + USD // 2, "output_pico_usd": 10**12}  # one USD a token
        async with open_hall(tmp_path, redis, model, worker.path, world=world(), **how) as hall:
            answers = await asyncio.gather(*(hall.chat(n=3, max_tokens=8, stream=k % 2 == 0) for k in range(5)))
            await hall.check_books()
            assert {answer.status for answer in answers} <= {200, 429}
            for _ in range(8):
                if (last := await hall.chat(n=3, max_tokens=11)).status != 200:
                    break
                await hall.check_books()
                total = last.json()["usage"]["completion_tokens"]
                lengths = [len(choice["message"]["content"].split()) for choice in last.json()["choices"]]
                assert sum(lengths) == total
                assert max(lengths) - min(lengths) <= 1
                assert lengths == sorted(lengths, reverse=True)
                if total < 33:
                    assert last.headers["x-bulkhead-budget"] == f"credit; max_tokens={total}"
                    assert all(choice["finish_reason"] == "length" for choice in last.json()["choices"])
            rows = await hall.usage_rows()
            assert sum(row.num_completion_tokens for row in rows.values()) == 61
            assert sum(counts.num_completion_tokens for counts in worker.counts.values()) == 61
        await worker.stop()

    runner.run(scenario())


def test_less_credit_than_answers(runner: asyncio.Runner, redis: Redis, short_folder: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        worker = IntegerWorker(short_folder / "few.sock", model=IntegerModel(eos_every=1_000_003))
        await worker.start()
        model = write_byte_model(tmp_path / "model")
        how = {"credit_nano_usd": 4 * USD + USD // 2, "output_pico_usd": 10**12}
        async with open_hall(tmp_path, redis, model, worker.path, world=world(), **how) as hall:
            for stream in (False, True):
                answer = (
                    await hall.chat(n=3, max_tokens=2, stream=stream) if stream else await hall.chat(n=3, max_tokens=1)
                )
                await hall.check_books()
                assert answer.status == 200
            assert answer.headers["x-bulkhead-budget"] == "credit; max_tokens=1"
            parts = streamed(answer.events())
            assert [parts[index][-1]["finish_reason"] for index in range(3)] == ["length"] * 3
            texts = ["".join(part["delta"].get("content", "") for part in parts[index]) for index in range(3)]
            assert [bool(text) for text in texts] == [True, False, False]
        await worker.stop()

    runner.run(scenario())


USAGES = st.builds(
    lambda prompt, cached, output: Usage(prompt, min(prompt, cached), output),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 9),
)


@given(st.lists(USAGES, max_size=4), st.randoms())
def test_sequences_of_one_request_come_to_one_usage(usages: list[Usage], chance: Any) -> None:
    total = together(usages)
    chance.shuffle(usages)
    assert together(usages) == total
    assert total.num_completion_tokens == sum(usage.num_completion_tokens for usage in usages)
    assert total.num_prompt_tokens == max((usage.num_prompt_tokens for usage in usages), default=0)
    assert total.num_cached_tokens <= total.num_prompt_tokens
    assert all(request_id_of(sequence_id("req_1", index)) == "req_1" for index in range(9))
