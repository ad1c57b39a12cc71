"""What the gateway and the engine worker say to each other over the unix socket.

A frame is a 4-byte big-endian length and one msgpack body. A body is an array whose first element is the message's
tag, so a frame stays small and an old reader meets an unknown tag instead of a half-read map. Fields are only ever
added at the end. A frame longer than the reader's limit closes the connection: lengths are checked before anything is
buffered.

Nothing here imports torch: the HTTP process reads this module.
"""

from collections.abc import Iterator

import msgspec

from engine.errors import ProtocolError

PROTOCOL_VERSION = 1
FRAME_BYTES_MAX = (
    8 * 1024 * 1024
)  # a prompt of a million token ids still fits; a lost reader cannot make us buffer more
_LENGTH_BYTES = 4

FINISH_REASONS = frozenset({"stop", "length", "abort", "error"})
ERROR_CODES = frozenset({"isolation_violation", "engine_failure", "too_long", "busy", "draining", "invalid_input"})


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How to choose tokens. ``temperature`` 0 is greedy; random numbers are keyed by (seed, position)."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens <= 0:
            raise ValueError(f"max_tokens must be greater than 0, not {self.max_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature must be between 0 and 100, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string must not be empty")


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """Start a sequence. ``sequence_id`` is chosen by the caller and unique among those alive.

    ``domain`` is the isolation tag: KV blocks never pass between domains. ``cache_salt`` has no default on purpose.
    """

    sequence_id: str
    domain: str
    cache_salt: bytes
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    weight: int = 1


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Stop a sequence; unknown ids are ignored (it may just have finished)."""

    sequence_id: str


class Drain(msgspec.Struct, frozen=True, array_like=True, tag="drain"):
    """Take no new sequences, finish the running ones within ``timeout_ms``, abort the rest, exit."""

    timeout_ms: int


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The first frame on every connection."""

    protocol_version: int
    epoch: str
    pid: int
    model_id: str
    model_digest: str
    context_max: int
    vocab_size: int
    block_size: int
    num_blocks: int
    dtype: str
    device: str
    kernels: str
    isolation: str


class TokenOutput(msgspec.Struct, frozen=True, array_like=True, tag="token"):
    """New output of one sequence. ``text`` and ``token_ids`` are deltas, the counts are cumulative and exact."""

    sequence_id: str
    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    finish_reason: str | None = None
    error: str = ""


class Stats(msgspec.Struct, frozen=True, array_like=True, tag="stats"):
    """The engine's counters, every second and at once on connect. Token counts are totals since the epoch began."""

    step: int
    num_running: int
    num_waiting: int
    num_blocks: int
    num_blocks_free: int
    blocks_by_domain: dict[str, int]
    num_prompt_tokens: int
    num_completion_tokens: int
    num_preemptions: int
    audit: dict[str, int]


class Incident(msgspec.Struct, frozen=True, array_like=True, tag="incident"):
    """A broken isolation rule. Its sequences end with error ``isolation_violation`` before a byte of theirs leaves."""

    kind: str
    step: int
    sequence_ids: list[str]
    domains: list[str]
    block_id: int
    detail: str


ToWorker = Submit | Abort | Drain
FromWorker = Ready | TokenOutput | Stats | Incident

_encoder = msgspec.msgpack.Encoder()
_to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)
_from_worker_decoder = msgspec.msgpack.Decoder(FromWorker)


def encode_frame(message: ToWorker | FromWorker, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> bytes:
    """One message as bytes on the wire. Raises ProtocolError if it is larger than the limit."""
    body = _encoder.encode(message)
    if len(body) > frame_bytes_max:
        raise ProtocolError(f"a frame of {len(body)} bytes is over the limit of {frame_bytes_max}")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def decode_to_worker(body: bytes) -> ToWorker:
    """Raises ProtocolError on anything that is not a whole, valid message."""
    try:
        message: ToWorker = _to_worker_decoder.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolError(f"bad frame from the client: {error}") from error
    return message


def decode_from_worker(body: bytes) -> FromWorker:
    """Raises ProtocolError on anything that is not a whole, valid message."""
    try:
        message: FromWorker = _from_worker_decoder.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolError(f"bad frame from the worker: {error}") from error
    return message


class FrameReader:
    """Cuts a byte stream into frame bodies; keeps at most one unfinished frame."""

    def __init__(self, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._frame_bytes_max = frame_bytes_max

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield every body completed by ``data``. Raises ProtocolError on a length over the limit."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH_BYTES:
                num_bytes = int.from_bytes(self._buffer[start : start + _LENGTH_BYTES], "big")
                if num_bytes > self._frame_bytes_max:
                    raise ProtocolError(f"a frame of {num_bytes} bytes is over the limit of {self._frame_bytes_max}")
                end = start + _LENGTH_BYTES + num_bytes
                if len(self._buffer) < end:
                    break
                body = bytes(self._buffer[start + _LENGTH_BYTES : end])
                start = end
                yield body
        finally:
            del self._buffer[:start]
