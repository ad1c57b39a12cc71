"""The auditor's own ledger of sequences: who each is, which tokens it consists of, and which blocks it reads, in order.

What a KV block holds depends on every token before it, so two sequences may read one block only if all tokens up to its
end are the same in both. The auditor decides that with digests of its own, made of the tokens that it has seen: the
prompt when the sequence began, and what the steps' arrays computed since. Engine keys play no part in it.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from audit.runtime.launch import Logprob


@dataclass(slots=True)
class AuditedSequence:
    sequence_id: str
    domain: str
    salt: bytes
    tokens: list[int]  # known so far: the prompt, then what was computed
    facts: Any = None  # sampling_rows.py: how it samples
    blocks: list[int] = field(default_factory=list)  # its block table
    pending: list[int] = field(default_factory=list)  # sampled and not yet sent
    pending_logprobs: list[Logprob] = field(default_factory=list)  # of its tokens, told by a launch and not yet sent
    pending_scores: list[Logprob] = field(default_factory=list)  # of its prompt's tokens, likewise
    unsaid: bytearray = field(default_factory=bytearray)  # what its tokens spell and no text has said
    has_spoken: bool = False
    num_scored: int = 0  # prompt tokens whose successors have been scored
    num_prompt: int = field(init=False)
    num_released: int = 0  # tokens sent
    num_computed: int = 0  # the most tokens that were ever in the cache
    first_start: int = -1  # where its first launch began: what it found computed
    _digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    def digest(self, index: int, block_size: int) -> bytes | None:
        """Of all tokens up to the end of block `index`, with domain and salt; None while they are not all known."""
        if (index + 1) * block_size > len(self.tokens):
            return None
        while len(self._digests) <= index:
            begin = len(self._digests) * block_size
            if self._digests:
                before = self._digests[-1]
            else:
                name = self.domain.encode()
                before = len(name).to_bytes(8, "little") + name + self.salt
            content = np.array(self.tokens[begin : begin + block_size], np.int64).tobytes()
            self._digests.append(hashlib.blake2b(content + before, digest_size=32).digest())
        return self._digests[index]

    def launched(self, start: int, num_tokens: int) -> None:
        """A launch computed its tokens from position `start` on."""
        if self.first_start < 0:
            self.first_start = start
        self.num_computed = max(self.num_computed, start + num_tokens)

    def samples(self, token_id: int, spelled: bytes = b"") -> None:
        """Its row gave this token: it is the sequence's next, and waits to be sent and said."""
        self.tokens.append(token_id)
        self.pending.append(token_id)
        self.unsaid += spelled

    def takes(self, start: int, tokens: list[int]) -> bool:
        """Whether `tokens` from position `start` on are its own; tokens beyond the known ones become known."""
        known = self.tokens[start : start + len(tokens)]
        if start > len(self.tokens) or known != tokens[: len(known)]:
            return False
        self.tokens += tokens[len(known) :]
        return True
