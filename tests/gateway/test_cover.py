"""A covered stream: pieces of one size at a steady beat, and behind them the same events as without."""

import asyncio
import json
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.cover import COMMENT_BYTES, Cover
from gateway.api.streaming import EventStream, SlowReaderError, event
from gateway.settings import Settings
from tests.fakes.asgi import Answer
from tests.fakes.integer_worker import IntegerWorker
from tests.gateway.conftest import Stage

PAD = 256


def without_comments(body: bytes) -> bytes:
    return re.sub(rb"(?m)^:[^\n]*\n\n", b"", body)


@given(st.binary(max_size=600), st.integers(16, 300))
def test_a_piece_is_filled_up_by_a_comment(text: bytes, pad_bytes: int) -> None:
    piece = event({"text": text.hex()}) if text else b""
    padded = Cover(pad_bytes, 0.0, os.urandom).padded(piece)
    assert len(padded) % pad_bytes == 0
    assert 0 < len(padded) < len(piece) + pad_bytes + COMMENT_BYTES
    assert padded.startswith(piece)
    assert without_comments(padded) == piece


def test_padding_is_drawn_for_each_piece() -> None:
    cover = Cover(PAD, 0.0, os.urandom)
    assert cover.padded(b"") != cover.padded(b"")


@pytest.mark.parametrize(
    ("by_itself", "asked", "covered"),
    [(False, None, False), (False, True, True), (True, None, True), (True, False, False)],
)
def test_a_client_may_ask_or_decline(by_itself: bool, asked: bool | None, covered: bool) -> None:
    settings = Settings(stream_cover=by_itself)
    assert (Cover.of(settings, asked, os.urandom) is not None) == covered


class Wire:
    """What left, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.ended = False
        self.stalled = False

    async def send(self, message: Any) -> None:
        if self.stalled:
            await asyncio.Event().wait()
        if message["type"] == "http.response.body":
            self.pieces.append(message["body"])
            self.ended = not message["more_body"]


async def say(wire: Wire, texts: list[str], pace_s: float, between_s: float = 0.0) -> None:
    stream = EventStream(wire.send, 5.0, Cover(PAD, pace_s, os.urandom))
    await stream.open()
    for text in texts:
        await stream.write(event({"text": text}))
        await asyncio.sleep(between_s)
    await stream.close()
    await stream.stop()


@given(st.lists(st.text(max_size=40), min_size=1, max_size=5), st.data())
def test_tokens_of_other_lengths_look_the_same(texts: list[str], data: st.DataObject) -> None:
    others = data.draw(st.lists(st.text(max_size=40), min_size=len(texts), max_size=len(texts)))
    wires = []
    for spoken in (texts, others):
        wire = Wire()
        asyncio.run(say(wire, spoken, pace_s=0.0))
        wires.append(wire)
        assert wire.ended
    first, second = ([len(piece) for piece in wire.pieces] for wire in wires)
    assert all(size % PAD == 0 for size in first + second)
    if all(len(event({"text": text})) + COMMENT_BYTES <= PAD for text in texts + others):
        assert first == second == [PAD] * (len(texts) + 1)


def test_a_beat_does_not_tell_when_tokens_come() -> None:
    """Ten tokens at once, or one and a silence: one piece a beat either way, of the same size while they fit."""

    async def gaps(texts: list[str], between_s: float) -> tuple[list[int], list[bytes]]:
        wire = Wire()
        await say(wire, texts, pace_s=0.02, between_s=between_s)
        return [len(piece) for piece in wire.pieces], wire.pieces

    slow, pieces = asyncio.run(gaps(["a", "b"], 0.1))
    assert len(slow) >= 8  # 0.2 s of beats, most of them with nothing to say
    assert set(slow) == {PAD}
    assert sum(without_comments(piece) == b"" for piece in pieces) >= 4
    fast, pieces = asyncio.run(gaps(["abc"] * 3, 0.0))
    assert set(fast) == {PAD}
    assert len(fast) <= 3
    whole = b"".join(map(without_comments, pieces))
    assert whole == event({"text": "abc"}) * 3 + b"data: [DONE]\n\n"


def test_who_stops_reading_is_noticed_behind_the_beat() -> None:
    async def stall() -> None:
        wire = Wire()
        stream = EventStream(wire.send, 0.05, Cover(PAD, 0.01, os.urandom))
        await stream.open()
        await stream.write(event({"text": "a"}))
        await asyncio.sleep(0.03)
        wire.stalled = True
        await stream.write(event({"text": "b"}))  # nobody takes it, and nobody knows yet
        await asyncio.sleep(0.2)
        with pytest.raises(SlowReaderError):
            await stream.write(event({"text": "c"}))
        with pytest.raises(SlowReaderError):
            await stream.close()
        await stream.stop()

    asyncio.run(stall())


@pytest.fixture(scope="module")
def covered(shared_stage: Stage) -> tuple[Any, IntegerWorker]:
    return shared_stage.make(stream_cover=True, stream_pad_bytes=512, stream_pace_ms=10)


def test_a_covered_answer_is_the_answer(runner: asyncio.Runner, covered: tuple[Any, IntegerWorker]) -> None:
    hall, _ = covered
    sizes: list[int] = []

    def note(answer: Answer) -> None:
        sizes.append(len(answer.body))

    def asked(on_sent: Callable[[Answer], None] | None = None, **options: bool) -> Answer:
        stream = {"stream": True, "stream_options": {"include_usage": True, **options}}
        answer: Answer = runner.run(hall.chat("hello", max_tokens=20, on_sent=on_sent, **stream))
        assert answer.complete
        return answer

    plain, hidden = asked(include_obfuscation=False), asked(note)
    assert b"\n:" not in plain.body
    assert [size % 512 for size in sizes] == [0] * len(sizes)
    assert _said(plain.events()) == _said(hidden.events())
    assert hidden.events()[-1] == "[DONE]"
    runner.run(hall.check_books())


def test_a_covered_stream_that_stalls_or_leaves_is_settled(runner: asyncio.Runner, shared_stage: Stage) -> None:
    hall, _ = shared_stage.make(stream_cover=True, stream_pad_bytes=512, stream_pace_ms=10, send_timeout_s=1)

    async def beats() -> int:
        return sum("EventStream._beat" in str(task.get_coro()) for task in asyncio.all_tasks())

    for how in ({"leave_after": 600}, {"stall_after": 600}):
        answer = runner.run(hall.chat("hello", max_tokens=100, ignore_eos=True, stream=True, **how))
        assert not answer.complete
        assert runner.run(beats()) == 0
    runner.run(hall.check_books())
    reasons = {row.finish_reason for row in runner.run(hall.usage_rows()).values()}
    assert reasons <= {"stop", "client_gone", "client_slow"}


def _said(events: list[Any]) -> tuple[str, Any]:
    texts = [c["delta"].get("content") or "" for one in events if one != "[DONE]" for c in one["choices"]]
    usage = [one["usage"] for one in events if one != "[DONE]" and one.get("usage")]
    for one in usage:
        one.pop("prompt_tokens_details", None)
    return "".join(texts), json.dumps(usage)
