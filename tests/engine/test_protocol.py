"""Frames: whatever goes in comes out, however the bytes are cut, and bad bytes are refused."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.client import merge
from engine.errors import ProtocolError
from engine.protocol import (
    Abort,
    Drain,
    Effort,
    FrameReader,
    FromWorker,
    Incident,
    Ready,
    SamplingParams,
    Stats,
    Submit,
    TokenOutput,
    ToWorker,
    decode_from_worker,
    decode_to_worker,
    encode_frame,
)

COUNTS = st.integers(0, 2**40)
NAMES = st.text(max_size=10)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**31),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(-(2**63), 2**64 - 1),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
)
TO_WORKER = st.one_of(
    st.builds(
        Submit,
        sequence_id=NAMES,
        domain=NAMES,
        cache_salt=st.binary(max_size=32),
        prompt_token_ids=st.lists(COUNTS, max_size=20),
        sampling=SAMPLING,
        priority=st.integers(-9, 9),
        weight=st.integers(1, 9),
    ),
    st.builds(Abort, sequence_id=NAMES),
    st.builds(Drain, timeout_ms=COUNTS),
)
TOKEN_OUTPUTS = st.builds(
    TokenOutput,
    sequence_id=st.just("s"),
    text=NAMES,
    token_ids=st.lists(COUNTS, max_size=4).map(tuple),
    num_prompt_tokens=COUNTS,
    num_cached_tokens=COUNTS,
    num_completion_tokens=COUNTS,
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    error=st.sampled_from(["", "busy"]),
    effort=st.none() | st.builds(Effort, *[COUNTS] * 5),
)
FROM_WORKER = st.one_of(
    TOKEN_OUTPUTS,
    st.builds(
        Ready,
        protocol_version=COUNTS,
        epoch=NAMES,
        pid=COUNTS,
        model_id=NAMES,
        model_digest=NAMES,
        context_max=COUNTS,
        vocab_size=COUNTS,
        block_size=COUNTS,
        num_blocks=COUNTS,
        dtype=NAMES,
        device=NAMES,
        kernels=NAMES,
        isolation=NAMES,
    ),
    st.builds(
        Stats,
        step=COUNTS,
        num_running=COUNTS,
        num_waiting=COUNTS,
        num_blocks=COUNTS,
        num_blocks_free=COUNTS,
        blocks_by_domain=st.dictionaries(NAMES, COUNTS, max_size=3),
        num_prompt_tokens=COUNTS,
        num_completion_tokens=COUNTS,
        num_preemptions=COUNTS,
        audit=st.dictionaries(NAMES, COUNTS, max_size=3),
        num_batch_tokens=COUNTS,
        num_rescued=COUNTS,
        step_ns=COUNTS,
        own_ns=COUNTS,
    ),
    st.builds(
        Incident,
        kind=NAMES,
        step=COUNTS,
        sequence_ids=st.lists(NAMES, max_size=3),
        domains=st.lists(NAMES, max_size=3),
        block_id=COUNTS,
        detail=NAMES,
    ),
)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@given(st.lists(TO_WORKER, max_size=5), st.lists(st.integers(0, 40), max_size=20))
def test_to_worker_round_trip(messages: list[ToWorker], sizes: list[int]) -> None:
    reader = FrameReader()
    data = b"".join(encode_frame(message) for message in messages)
    bodies = [body for piece in cut(data, sizes) for body in reader.feed(piece)]
    assert [decode_to_worker(body) for body in bodies] == messages


@given(st.lists(FROM_WORKER, max_size=5), st.lists(st.integers(0, 40), max_size=20))
def test_from_worker_round_trip(messages: list[FromWorker], sizes: list[int]) -> None:
    reader = FrameReader()
    data = b"".join(encode_frame(message) for message in messages)
    bodies = [body for piece in cut(data, sizes) for body in reader.feed(piece)]
    assert [decode_from_worker(body) for body in bodies] == messages


@given(st.binary(max_size=60))
def test_bad_bodies_are_protocol_errors_and_nothing_else(body: bytes) -> None:
    for decode in (decode_to_worker, decode_from_worker):
        with contextlib.suppress(ProtocolError):
            decode(body)


def test_a_length_over_the_limit_is_refused_before_its_body_is_buffered() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        list(FrameReader(frame_bytes_max=10).feed(b"\x00\x00\x00\x0b"))
    with pytest.raises(ProtocolError, match="over the limit"):
        encode_frame(Abort("x" * 100), frame_bytes_max=50)


@pytest.mark.parametrize("message", [Drain(2**64), Abort("half a pair \ud800")])
def test_what_msgpack_cannot_write_is_refused(message: ToWorker) -> None:
    with pytest.raises(ProtocolError, match="cannot be written"):
        encode_frame(message)


def test_golden_frame() -> None:
    """A frame of protocol version 1: what has been added since came at the end, so it still reads."""
    submit = Submit("s1", "d", b"\x01", [5], SamplingParams(max_tokens=2, temperature=0.0))
    first = "98a67375626d6974a27331a164c401019105" + "9602cb0000000000000000" + "cb3ff00000000000000090c20001"
    assert decode_to_worker(bytes.fromhex(first)) == submit
    old_fields = msgspec.msgpack.decode(bytes.fromhex(first))
    new_fields = msgspec.msgpack.decode(encode_frame(submit)[4:])
    assert new_fields[:5] == old_fields[:5]
    assert new_fields[5][: len(old_fields[5])] == old_fields[5]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
        {"stop": ("",)},
    ],
)
def test_sampling_params_are_checked_on_both_ends(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        SamplingParams(**({"max_tokens": 1} | changes))  # type: ignore[arg-type]
    good = list(msgspec.structs.astuple(SamplingParams(max_tokens=1)))
    for name, value in changes.items():
        good[SamplingParams.__struct_fields__.index(name)] = value
    if good[3] < -(2**63) or good[3] >= 2**64:
        return  # no frame can hold it
    with pytest.raises(ProtocolError):
        decode_to_worker(msgspec.msgpack.encode(["submit", "s", "d", b"", [1], good, 0, 1]))


def test_the_cache_salt_has_no_default() -> None:
    with pytest.raises(TypeError):
        Submit("s", "d", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=1))  # type: ignore[call-arg]


@given(TOKEN_OUTPUTS, TOKEN_OUTPUTS)
def test_merging_keeps_all_text_and_the_later_counts(first: TokenOutput, second: TokenOutput) -> None:
    merged = merge(first, second)
    assert merged.text == first.text + second.text
    assert merged.token_ids == first.token_ids + second.token_ids
    assert merged.num_completion_tokens == second.num_completion_tokens
    assert merged.finish_reason == second.finish_reason
