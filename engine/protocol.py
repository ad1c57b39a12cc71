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

PROTOCOL_VERSION = 5  # 5: a worker that knows less would close a connection that asks it to erase
FRAME_BYTES_MAX = (
    8 * 1024 * 1024
)  # a prompt of a million token ids still fits; a lost reader cannot make us buffer more
_LENGTH_BYTES = 4
OWN = "audit/"  # how the names of sequences begin that no client has asked for, and those of their domains

FINISH_REASONS = frozenset({"stop", "length", "abort", "error"})
ERROR_CODES = frozenset(
    {"isolation_violation", "engine_failure", "too_long", "busy", "draining", "closed", "invalid_input"}
)

REPETITION_PENALTY_MIN = 0.01  # smaller or larger ones leave the range of numbers
REPETITION_PENALTY_MAX = 100.0
PENALTY_MAX = 2.0  # OpenAI's, both ways
BIAS_MAX = 100.0  # OpenAI's, both ways
LOGPROBS_MAX = 20  # OpenAI's
PROMPT_LOGPROBS_MAX = 5  # OpenAI's for completions: a prompt has many tokens


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How to choose tokens. ``temperature`` 0 is greedy; random numbers are keyed by (seed, position)."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of tokens in prompt and answer
    presence_penalty: float = 0.0  # of tokens in the answer, as is the next
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    include_stop: bool = False  # the stop text stays at the answer's end
    logprobs: int = -1  # how many of the likeliest tokens to tell with each token; -1: not even its own probability
    grammar: str = ""  # engine/sampling/grammar.py: the form that the answer must have; "" is any
    prompt_logprobs: int = (
        -1
    )  # how many of the likeliest tokens to tell with each prompt token; -1: nothing of the prompt

    def __post_init__(self) -> None:
        if self.max_tokens <= 0:
            raise ValueError(f"max_tokens must be greater than 0, not {self.max_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature must be between 0 and 100, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must fit into 64 bits, not {self.seed}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string must not be empty")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 or greater, not {self.top_k}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be in [0, 1], not {self.min_p}")
        if not REPETITION_PENALTY_MIN <= self.repetition_penalty <= REPETITION_PENALTY_MAX:
            raise ValueError(
                f"repetition_penalty must be between {REPETITION_PENALTY_MIN} and {REPETITION_PENALTY_MAX},"
                f" not {self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -PENALTY_MAX <= getattr(self, name) <= PENALTY_MAX:
                raise ValueError(f"{name} must be between -{PENALTY_MAX} and {PENALTY_MAX}, not {getattr(self, name)}")
        if len({token_id for token_id, _ in self.logit_bias}) != len(self.logit_bias):
            raise ValueError("logit_bias must name each token once")
        if not all(-BIAS_MAX <= bias <= BIAS_MAX for _, bias in self.logit_bias):
            raise ValueError(f"a bias must be between -{BIAS_MAX} and {BIAS_MAX}")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be 0 or greater, not {self.min_tokens}")
        if not -1 <= self.logprobs <= LOGPROBS_MAX:
            raise ValueError(f"logprobs must be between -1 and {LOGPROBS_MAX}, not {self.logprobs}")
        if not -1 <= self.prompt_logprobs <= PROMPT_LOGPROBS_MAX:
            raise ValueError(
                f"prompt_logprobs must be between -1 and {PROMPT_LOGPROBS_MAX}, not {self.prompt_logprobs}"
            )

    @property
    def named_token_ids(self) -> list[int]:
        """Every token id that the parameters speak of; each must be in the model's vocabulary."""
        return [token_id for token_id, _ in self.logit_bias] + list(self.stop_token_ids)


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """Start a sequence. ``sequence_id`` is chosen by the caller and unique among those alive.

    ``domain`` is the isolation tag: KV blocks never pass between domains. ``cache_salt`` has no default on purpose.
    ``priority`` is the service tier, a number of engine/scheduling/tiers.py; ``weight`` is the domain's share within a
    tier. ``nonce`` is nobody's but this sequence's: its outputs carry it back, and one that carries another is not
    passed on (engine/client.py).
    """

    sequence_id: str
    domain: str
    cache_salt: bytes
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    weight: int = 1
    nonce: int = 0  # below 2^63


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Stop a sequence; unknown ids are ignored (it may just have finished)."""

    sequence_id: str


class Drain(msgspec.Struct, frozen=True, array_like=True, tag="drain"):
    """Take no new sequences, finish the running ones within ``timeout_ms``, abort the rest, exit."""

    timeout_ms: int


class Erase(msgspec.Struct, frozen=True, array_like=True, tag="erase"):
    """Whose domain it is has left for good: its sequences end, and the blocks with its numbers are zeroed."""

    domain: str


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


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token of the answer and its log probability in the distribution that it was drawn from; or a token of the
    prompt and its log probability in what the model says after the tokens before it, nothing added, scaled or cut off.

    ``top``: the likeliest tokens of that distribution, the likeliest first, itself among them if it is one of them.
    ``offset``: characters of the answer before its text; ``rank``: of a prompt's token, 1 for the likeliest.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0
    rank: int = 0


class Effort(msgspec.Struct, array_like=True):
    """What a sequence has taken of the engine so far (engine/timekeeper.py says how it is shared). An output in the
    worker holds the very account that still grows; what is written of it is how it stands when the step is over.

    ``engine_ns``: its parts of the steps' time. ``block_ns``: blocks times the time for which it had them; of several
    sequences that share one, it counts for one. ``num_prefill_tokens``: prompt tokens computed, each once.
    ``num_recomputed_tokens``: tokens computed again after its blocks were taken. ``num_decode_steps``: tokens of its
    answer that were fed back, one in a step: the last one never is.
    """

    engine_ns: int = 0
    block_ns: int = 0
    num_prefill_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_decode_steps: int = 0


class TokenOutput(msgspec.Struct, frozen=True, array_like=True, tag="token"):
    """New output of one sequence. ``text`` and ``token_ids`` are deltas, the counts are cumulative and exact.

    ``logprobs`` are of the tokens whose text is complete with this delta, where they were asked for: a token whose text
    waits comes later than in ``token_ids``, and one whose text is not part of the answer does not come.

    ``prompt_logprobs``, where they were asked for, are of the prompt's tokens from its second on, in order and each
    once, in one or more deltas that come before the first token or with it.
    """

    sequence_id: str
    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    finish_reason: str | None = None
    error: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    nonce: int = 0  # its Submit's
    effort: Effort | None = None  # None: not measured


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
    num_batch_tokens: int = 0  # computed in all steps, recomputed ones too
    num_batch_rows: int = 0  # rows of all steps
    num_rows_max: int = 0  # rows that a step can have
    num_slots_held: int = 0  # cache slots of all blocks that sequences hold now
    num_slots_filled: int = 0  # of those, the ones with a token
    num_blocks_scrubbed: int = 0
    num_preemptions_kept: int = 0  # of num_preemptions: blocks kept, nothing lost
    num_rescued: int = 0  # sequences that had waited too long
    closed: bool = False  # nothing is taken in any more: too many steps broke isolation
    num_steps_broken_off: int = 0  # for first tokens that were owed; computed again
    num_tokens_lost: int = 0  # of those steps, by the share of their layers that was computed
    step_ns: int = 0  # of all steps
    own_ns: int = 0  # of those, what is no client's: the observer's own runs, steps without a row


class Incident(msgspec.Struct, frozen=True, array_like=True, tag="incident"):
    """A broken isolation rule. Its sequences end with error ``isolation_violation`` before a byte of theirs leaves.

    Kind ``admission_closed`` names nobody: such steps have become too many, and the worker takes nothing in any more.
    """

    kind: str
    step: int
    sequence_ids: list[str]
    domains: list[str]
    block_id: int
    detail: str


class Erased(msgspec.Struct, frozen=True, array_like=True, tag="erased"):
    """The answer to Erase: how many blocks held something of the domain."""

    domain: str
    num_blocks: int


ToWorker = Submit | Abort | Drain | Erase
FromWorker = Ready | TokenOutput | Stats | Incident | Erased

_encoder = msgspec.msgpack.Encoder()
_to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)
_from_worker_decoder = msgspec.msgpack.Decoder(FromWorker)


def encode_frame(message: ToWorker | FromWorker, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> bytes:
    """One message as bytes on the wire. Raises ProtocolError if it is larger than the limit or cannot be written: a
    number beyond 64 bits, half of a surrogate pair in a text."""
    try:
        body = _encoder.encode(message)
    except (OverflowError, UnicodeEncodeError) as error:
        raise ProtocolError(f"a message cannot be written: {error}") from error
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
