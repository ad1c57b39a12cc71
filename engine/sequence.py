"""A sequence: the tokens of one request and how far the engine has come with them.

One number explains the whole engine: ``num_computed_tokens`` catches up with ``num_tokens``. A prompt chunk, a decode
step and a recomputation after preemption are the same thing: some tokens are known, fewer are in the cache.
"""

from dataclasses import dataclass, field
from enum import Enum

from engine.cache.prefix_index import Prefix
from engine.cache.prefix_key import block_key, root_key
from engine.effort import Account
from engine.protocol import SamplingParams, Submit


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    STOPPED = "stop"
    LENGTH_REACHED = "length"
    ABORTED = "abort"
    FAILED = "error"


class Event(Enum):
    ADMIT = "admit"
    PREEMPT = "preempt"
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    FAIL = "fail"


TRANSITIONS: dict[tuple[Status, Event], Status] = {
    (Status.WAITING, Event.ADMIT): Status.RUNNING,
    (Status.PREEMPTED, Event.ADMIT): Status.RUNNING,
    (Status.RUNNING, Event.PREEMPT): Status.PREEMPTED,
    (Status.RUNNING, Event.STOP): Status.STOPPED,
    (Status.RUNNING, Event.LENGTH): Status.LENGTH_REACHED,
    (Status.WAITING, Event.ABORT): Status.ABORTED,
    (Status.RUNNING, Event.ABORT): Status.ABORTED,
    (Status.PREEMPTED, Event.ABORT): Status.ABORTED,
    (Status.WAITING, Event.FAIL): Status.FAILED,
    (Status.RUNNING, Event.FAIL): Status.FAILED,
    (Status.PREEMPTED, Event.FAIL): Status.FAILED,
}

COMPLETE = frozenset({Status.STOPPED, Status.LENGTH_REACHED})  # it came to its own end
TERMINAL = COMPLETE | {Status.ABORTED, Status.FAILED}


@dataclass(slots=True, eq=False)
class Sequence:
    """``arrival`` is its place in the line, given once and kept through preemption. A preempted sequence may keep its
    blocks: then num_computed_tokens stays what it was."""

    sequence_id: str
    domain: str
    cache_salt: bytes
    token_ids: list[int]  # prompt, then output
    sampling: SamplingParams
    arrival: int
    tier: int = 0  # engine/scheduling/tiers.py
    weight: int = 1
    nonce: int = 0  # of its Submit, for its outputs
    block_keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as anybody asked
    root_key: bytes = b""
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0  # leading tokens whose keys and values are in the cache
    num_computed_max: int = 0  # the most that has ever been computed: what was served, whatever preemption takes back
    num_scored_tokens: int = 0  # leading tokens whose logits have told the log probability of the prompt's next token
    num_cached_tokens: int = 0  # prompt tokens that it found in the prefix cache when it first ran
    block_ids: list[int] = field(default_factory=list)
    served_at_arrival: int = 0  # tokens that everybody had been served when it came
    served_at_progress: int = 0  # and when it last got a token computed that had never been
    num_charged_tokens: int = 0  # of its tokens, those that its domain's counter holds
    num_skipped: int = 0  # times that another entered because this one, which was next, found no room
    owed: bool = False  # it was admitted as one whose first token is owed: engine/scheduling/first_tokens.py
    row: int = -1  # its stable row while running
    status: Status = Status.WAITING
    error: str = ""
    account: Account = field(default_factory=Account)  # what it has taken of the engine
    rank: int = field(init=False)  # its tier, or tiers.RESCUED

    @classmethod
    def of(cls, submit: Submit, *, arrival: int, model_digest: str) -> "Sequence":
        return cls(
            sequence_id=submit.sequence_id,
            domain=submit.domain,
            cache_salt=submit.cache_salt,
            token_ids=list(submit.prompt_token_ids),
            sampling=submit.sampling,
            arrival=arrival,
            tier=submit.priority,
            weight=submit.weight,
            nonce=submit.nonce,
            root_key=root_key(domain=submit.domain, cache_salt=submit.cache_salt, model_digest=model_digest),
        )

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.rank = self.tier

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_unscored(self) -> int:
        """Prompt tokens whose logits must still be looked at, for the log probability of the prompt's next token."""
        return self.num_prompt_tokens - 1 - self.num_scored_tokens if self.sampling.prompt_logprobs >= 0 else 0

    @property
    def num_tokens_shareable(self) -> int:
        """Leading tokens that it may find in the prefix cache instead of computing them: never its last one, and none
        whose logits must still be looked at. They need not be looked at twice, so after a preemption it may find more
        than when it came."""
        return self.num_scored_tokens if self.num_unscored else self.num_tokens - 1

    @property
    def num_prompt_tokens_served(self) -> int:
        """Prompt tokens that the engine has worked on: 0 for a sequence that never ran."""
        return min(self.num_computed_max, self.num_prompt_tokens)

    def advance(self, num_new_tokens: int) -> int:
        """So many tokens have been computed; how many of them are of its prompt and had never been."""
        first, known, num_prompt = self.num_computed_tokens, self.num_computed_max, self.num_prompt_tokens
        self.num_computed_tokens = end = first + num_new_tokens
        if num_prompt <= first >= known:  # of its answer, and new: nearly every row of nearly every step
            self.num_computed_max = end
            self.account.effort.num_decode_steps += num_new_tokens
            return 0
        if not known:
            self.num_cached_tokens = first
        self.num_computed_max = max(known, end)
        self.account.compute(first, end, known, num_prompt)
        return min(self.num_computed_max, num_prompt) - min(known, num_prompt)

    @property
    def finished(self) -> bool:
        return self.status in TERMINAL

    @property
    def finish_reason(self) -> str | None:
        return self.status.value if self.finished else None

    def key(self, index: int, block_size: int) -> bytes:
        """The name of what its block ``index`` holds once it is full. Its tokens must be known up to there."""
        while len(self.block_keys) <= index:
            first = len(self.block_keys) * block_size
            parent = self.block_keys[-1] if self.block_keys else self.root_key
            self.block_keys.append(block_key(parent, self.token_ids[first : first + block_size]))
        return self.block_keys[index]

    def prefix(self, index: int, block_size: int) -> Prefix:
        """The same with all that the name was made of."""
        key = self.key(index, block_size)
        parent = self.block_keys[index - 1] if index else self.root_key
        tokens = tuple(self.token_ids[index * block_size : (index + 1) * block_size])
        assert len(tokens) == block_size, f"{self.sequence_id}: block {index} is not full"
        return Prefix(self.domain, parent, key, tokens)

    def apply(self, event: Event) -> None:
        """Move along the table. A missing entry is our bug."""
        key = (self.status, event)
        assert key in TRANSITIONS, f"{self.sequence_id}: {event.value} while {self.status.value}"
        self.status = TRANSITIONS[key]

    def fail(self, error: str) -> None:
        self.apply(Event.FAIL)
        self.error = error
