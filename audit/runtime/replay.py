"""Finished sequences that are run again alone: which ones, what each had sent, and whether it says the same again.

Where an answer is bit for bit independent of its company, the same sequence run alone must give the same tokens and the
same bits of every log probability. What differs went wrong inside a launch, where no other check can look: logits that
change places, a kernel that reads beside its table. It is found after the answer has left, and only for the sequences
that were drawn.

What is compared is what this room saw leave, not what the engine says that it sent. How to run a sequence again is
somebody else's knowledge and lies beside the record unread (``recipe``). Memory has a bound: a record that would go
beyond it is dropped and counted, and so is one whose run was broken off TRIES_MAX times.

An incident goes into the log and into reports, so it names the place and not the tenant's words: tokens show as digests
under a key of this process, log probabilities as their bits.
"""

import hashlib
import struct
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from audit.runtime.launch import Logprob
from audit.runtime.released_tokens import Output

OWN = "audit/"  # how the names of the auditor's own sequences and domains begin: no client's do
BYTES_MAX = 8 * 1024 * 1024
TRIES_MAX = 4
RECORD_BYTES = 600  # of a record without content, about
COMPLETE = frozenset({"stop", "length"})


def packed(one: Logprob) -> bytes:
    """Every bit of it: equal bytes are equal numbers, and minus zero is not zero."""
    return struct.pack("<qdq", one.token_id, one.logprob, one.rank) + b"".join(
        struct.pack("<qd", token_id, logprob) for token_id, logprob in one.top
    )


def _num_differing_bits(said: "Said", again: "Said") -> int:
    """Of what both have said; what only one has said counts as one."""
    pairs = [
        (said.token_ids.tobytes(), again.token_ids.tobytes()),
        (b"".join(said.logprobs), b"".join(again.logprobs)),
        (b"".join(said.scores), b"".join(again.scores)),
    ]
    num = 0
    for first, second in pairs:
        size = min(len(first), len(second))
        num += (int.from_bytes(first[:size]) ^ int.from_bytes(second[:size])).bit_count() + (len(first) != len(second))
    return num


def _bits(data: bytes) -> str:
    return float(struct.unpack_from("<d", data, 8)[0]).hex()


@dataclass(slots=True)
class Said:
    """What has left of one sequence."""

    token_ids: "array[int]" = field(default_factory=lambda: array("q"))
    logprobs: list[bytes] = field(default_factory=list)
    scores: list[bytes] = field(default_factory=list)  # of its prompt's tokens
    ending: str = ""

    def hear(self, output: Output) -> int:
        """Returns how many bytes that took, about."""
        logprobs, scores = list(map(packed, output.logprobs)), list(map(packed, output.prompt_logprobs))
        self.token_ids.extend(output.token_ids)
        self.logprobs += logprobs
        self.scores += scores
        self.ending = output.finish_reason
        return 8 * len(output.token_ids) + sum(48 + len(one) for one in (*logprobs, *scores))


@dataclass(slots=True, eq=False)
class Record:
    sequence_id: str
    domain: str
    recipe: Any
    num_bytes: int
    said: Said = field(default_factory=Said)
    num_tries: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.said.token_ids)


@dataclass(frozen=True, slots=True)
class Difference:
    record: Record
    detail: str


class Replays:
    """``percent`` of all sequences are drawn when they begin, 0 none; ``seed``, 0 to 2^127, decides which, and keys the
    digests: it is a secret."""

    def __init__(self, percent: int = 0, bytes_max: int = BYTES_MAX, seed: int = 0) -> None:
        if not 0 <= percent <= 100:
            raise ValueError(f"a percentage lies between 0 and 100, not at {percent}")
        self.num_sequences = 0  # that have ended with something to compare, drawn or not
        self.num_compared = 0
        self.num_canaries_compared = 0
        self.num_differing = 0
        self.num_differing_bits = 0
        self.num_broken_off = 0
        self.num_dropped = 0
        self.num_bytes = 0
        self._percent = percent
        self._bytes_max = bytes_max
        self._random = Random(seed)  # noqa: S311 - which ones, no secret
        self._key = seed.to_bytes(16, "little")
        self._live: dict[str, Record] = {}
        self._ready: deque[Record] = deque()
        self._running: tuple[str, Record, Said] | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._ready)

    def begins(
        self, sequence_id: str, domain: str, recipe: Callable[[], tuple[int, Any]], *, always: bool = False
    ) -> None:
        """A sequence was taken in. If it is drawn, ``recipe`` is asked for the recipe's bytes in memory, and for it."""
        drawn = self._percent and (always or self._random.randrange(100) < self._percent)
        if drawn and sequence_id not in self._live:
            num_bytes, made = recipe()
            record = Record(sequence_id, domain, made, 0)
            self._live[sequence_id] = record
            self._grow(record, RECORD_BYTES + num_bytes)

    def sends(self, output: Output) -> None:
        """An output has passed every check and leaves."""
        own = output.sequence_id.startswith(OWN)
        ended = output.finish_reason in COMPLETE or (output.finish_reason == "abort" and output.num_completion_tokens)
        self.num_sequences += bool(ended and not own)
        record = self._live.get(output.sequence_id)
        if record is None:
            return
        if output.failed:
            self.forget(output.sequence_id)
            return
        self._grow(record, record.said.hear(output))
        if output.finish_reason and self._live.pop(output.sequence_id, None) is not None:
            if ended or record.said.scores:
                self._ready.append(record)
            else:
                self.num_bytes -= record.num_bytes

    def forget(self, name: str) -> None:
        """A sequence or a run did not end well, or may not be trusted: there is nothing to compare."""
        record = self._live.pop(name, None)
        if self._running is not None and self._running[0] == name:
            record, self._running = self._running[1], None
            self.num_dropped += 1
        self.num_bytes -= record.num_bytes if record is not None else 0

    def forget_domain(self, domain: str) -> None:
        """Of a domain that has left nothing is kept; a run of it must be over."""
        for record in [one for one in self._ready if one.domain == domain]:
            self._ready.remove(record)
            self.num_bytes -= record.num_bytes
        for name in [name for name, one in self._live.items() if one.domain == domain]:
            self.forget(name)
        if self._running is not None and self._running[1].domain == domain:
            self.forget(self._running[0])

    def next(self, run_id: str) -> Record | None:
        """The next to be run again, under this name. One at a time."""
        if self._running is not None or not self._ready:
            return None
        record = self._ready.popleft()
        record.num_tries += 1
        self._running = run_id, record, Said()
        return record

    def hears(self, output: Output) -> Difference | None:
        """An output of the run. At its end: the first thing that differs."""
        if self._running is None or output.sequence_id != self._running[0]:
            return None
        _, record, again = self._running
        if not output.failed:
            again.hear(output)
        if not output.finish_reason and not output.failed:
            return None
        self._running = None
        detail = self._difference(record.said, again)
        if detail or output.finish_reason in COMPLETE:
            is_own = record.sequence_id.startswith(OWN)
            self.num_compared += not is_own
            self.num_canaries_compared += is_own
            self.num_differing += bool(detail)
            self.num_differing_bits += _num_differing_bits(record.said, again) if detail else 0
        elif output.finish_reason == "abort" and record.num_tries < TRIES_MAX:
            self.num_broken_off += 1
            self._ready.append(record)  # behind the others: a long one must not keep them from their turn
            return None
        else:
            self.num_dropped += 1
        self.num_bytes -= record.num_bytes
        return Difference(record, detail) if detail else None

    def _grow(self, record: Record, num_bytes: int) -> None:
        record.num_bytes += num_bytes
        self.num_bytes += num_bytes
        if self.num_bytes > self._bytes_max:
            self.num_dropped += 1
            self.forget(record.sequence_id)

    def _difference(self, said: Said, again: Said) -> str:
        """ "" where all is equal as far as both go, and both go to the end if both came there."""
        parts: Sequence[tuple[str, Sequence[Any], Sequence[Any]]] = (
            ("token", said.token_ids, again.token_ids),
            ("log probability", said.logprobs, again.logprobs),
            ("log probability of the prompt's", said.scores, again.scores),
        )
        for name, first, second in parts:
            for at, (one, other) in enumerate(zip(first, second, strict=False)):
                if one != other:
                    place = f"{name} {at} of {len(first)}"
                    return f"{place}: {self._shown(one, other)} left, {self._shown(other, one)} when run alone"
            whole = said.ending in COMPLETE and again.ending in COMPLETE
            if whole and len(first) != len(second):
                return f"{name}: {len(first)} left, {len(second)} when run alone"
        if said.ending == "abort" and again.ending in COMPLETE and len(again.token_ids) < len(said.token_ids):
            return f"token: {len(said.token_ids)} left, {len(again.token_ids)} when run alone"
        if said.ending in COMPLETE and again.ending in COMPLETE and said.ending != again.ending:
            return f"it ended with {said.ending}, and with {again.ending} when run alone"
        return ""

    def _shown(self, value: int | bytes, other: int | bytes) -> str:
        if isinstance(value, bytes) and isinstance(other, bytes) and value[8:16] != other[8:16]:
            return _bits(value)
        data = value if isinstance(value, bytes) else value.to_bytes(8, "little", signed=True)
        return "#" + hashlib.blake2b(data, key=self._key, digest_size=6).hexdigest()
