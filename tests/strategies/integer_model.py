"""A model without arithmetic: its cache holds plain tokens, its next token is a hash of everything that it can see.

It stands behind the same face as the real runner, so the whole engine runs on it in microseconds, and it is
merciless: one token too many, too few, stale or foreign in the blocks of a sequence changes all that follows.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch
from engine.core import EngineCore
from engine.errors import BrokenOffError
from engine.events import EngineEvent, NullObserver, Observer, SamplingState, StepEvidence, Violation
from engine.protocol import SamplingParams, Submit, TokenLogprob
from engine.sampling.row import Row
from engine.sampling.sampler import NOT_FINITE, Pick, Picks, pick, scored
from engine.scheduling.break_off import GoOn
from engine.scheduling.order import WAIT_MAX_TOKENS
from engine.scheduling.tiers import TIERS

VOCAB_SIZE = 64
EOS_TOKEN_ID = 0
NUM_LAYERS = 4  # between which a launch can be broken off
HALF_DONE = 1 << 40  # what a slot holds of which not all layers are written


def compute_layers(slots: NDArray[np.int64], written: NDArray[np.int64], go_on: GoOn | None) -> None:
    """A launch as far as its cache goes: what it writes into ``slots`` is of no use before its last layer."""
    for layer in range(1, NUM_LAYERS + 1):
        slots[written] = HALF_DONE + layer
        if go_on is not None and not go_on(layer / NUM_LAYERS):
            raise BrokenOffError(layer / NUM_LAYERS)


def next_token(token_ids: list[int]) -> int:
    """Never the end token, so that tests choose lengths by max_tokens."""
    value = 7
    for token_id in token_ids:
        value = (value * 31 + token_id + 1) % 1_000_003
    return value % (VOCAB_SIZE - 1) + 1


def continuation(prompt: list[int], num_tokens: int) -> list[int]:
    """What a sequence of this prompt must give, whoever else is there."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


def decode(token_ids: object) -> str:
    """One letter a token, so that texts can be compared with tokens."""
    assert isinstance(token_ids, list)
    return "".join(chr(0x100 + token_id) for token_id in token_ids)


class IntegerRunner:
    """``fail_steps``: steps whose launch raises. ``broken_rows``: stable rows whose numbers are never finite."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.slots = np.zeros(num_blocks * block_size, dtype=np.int64)  # 0: zeroed, else token id + 1
        self.fail_steps: set[int] = set()
        self.broken_rows: set[int] = set()
        self.rows: dict[int, Row] = {}

    def set_row(self, index: int, row: Row) -> None:
        self.rows[index] = row

    def state_of(self, index: int) -> SamplingState:
        return self.rows[index].state() if index in self.rows else SamplingState()

    def scrub(self, block_ids: list[int]) -> None:
        self.slots.reshape(-1, self.block_size)[block_ids] = 0

    def execute(self, batch: Batch, go_on: GoOn | None = None) -> Picks:
        evidence = batch.evidence
        compute_layers(self.slots, evidence.slot_mapping, go_on)
        self.slots[evidence.slot_mapping] = batch.token_ids + 1
        if evidence.step in self.fail_steps:
            raise RuntimeError("the launch failed, half of it done")
        picked = []
        for index, row in zip(batch.sampled_index, batch.sampled_rows.tolist(), strict=True):
            kv_len = int(evidence.kv_lens[index])
            blocks = evidence.block_tables[index, : -(-kv_len // self.block_size)]
            seen = self.slots.reshape(-1, self.block_size)[blocks].reshape(-1)[:kv_len]
            assert seen.all(), "a slot below kv_len was never written"
            assert (seen - 1).tolist() == self.rows[row].token_ids, "the row holds another sequence's tokens"
            picked.append(Pick(NOT_FINITE) if row in self.broken_rows else self.pick((seen - 1).tolist(), row))
        return Picks(
            np.array([one.token_id for one in picked], dtype=np.int64),
            {index: one.logprob for index, one in enumerate(picked) if one.logprob is not None},
            self.scores(batch),
        )

    def scores(self, batch: Batch) -> dict[int, tuple[TokenLogprob, ...] | None]:
        """Of the prompt's tokens, from what the cache holds before each: the real arithmetic on invented logits."""
        told: dict[int, tuple[TokenLogprob, ...] | None] = {}
        places = iter(batch.positions[batch.scored_tokens].tolist())
        for part in batch.scored:
            blocks = batch.evidence.block_tables[part.index]
            seen = (self.slots.reshape(-1, self.block_size)[blocks].reshape(-1) - 1).tolist()
            num_top = self.rows[part.row].sampling.prompt_logprobs
            scores = [scored(logits_of(seen[: next(places) + 1]), one, num_top) for one in part.next_token_ids]
            broken = part.row in self.broken_rows
            told[part.index] = None if broken else tuple(one for one in scores if one is not None)
        return told

    def pick(self, seen: list[int], row: int) -> Pick:
        return Pick(next_token(seen))


class LogitsRunner(IntegerRunner):
    """Its logits are a hash of everything that it can see; the real sampler takes a token from them."""

    def pick(self, seen: list[int], row: int) -> Pick:
        return pick(logits_of(seen), self.rows[row], len(seen))


def logits_of(token_ids: list[int]) -> NDArray[np.float32]:
    """[VOCAB_SIZE], with ties, and now and then the end token on top."""
    values = np.random.default_rng(token_ids).integers(-8, 9, VOCAB_SIZE) / 4
    return values.astype(np.float32)


@dataclass
class Watcher(NullObserver):
    """An observer that keeps its own small ledger of owners and complains at once; it shares nothing with the pool."""

    max_batched_tokens: int
    max_num_seqs: int
    block_size: int
    owner: dict[int, str] = field(default_factory=dict)
    num_readers: dict[int, int] = field(default_factory=dict)
    published: dict[int, str] = field(default_factory=dict)  # block -> domain
    alive: dict[str, str] = field(default_factory=dict)  # sequence -> domain
    last_owner: dict[int, str] = field(default_factory=dict)
    generation: dict[int, int] = field(default_factory=dict)
    evidence: list[StepEvidence] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)  # handed out at the next launch

    def on_events(self, events: list[EngineEvent]) -> None:
        for event in events:
            block = event.block_id
            if event.kind == "begin":
                assert self.alive.setdefault(event.sequence_id, event.domain) == event.domain
            elif event.kind == "end":
                del self.alive[event.sequence_id]
            elif event.kind == "allocate":
                assert block not in self.owner, f"block {block} has two owners"
                assert block not in self.published, f"block {block} can still be shared"
                assert self.last_owner.get(block, event.domain) == event.domain, f"block {block} was not scrubbed"
                assert event.generation > self.generation.get(block, 0), f"block {block}: generation did not grow"
                self.owner[block] = self.last_owner[block] = event.domain
                self.generation[block] = event.generation
                self.num_readers[block] = 1
            elif event.kind == "publish":
                assert self.owner[block] == event.domain
                self.published[block] = event.domain
            elif event.kind == "share":
                assert self.published[block] == self.alive[event.sequence_id] == event.domain
                assert self.generation[block] == event.generation
                self.owner[block] = event.domain
                self.num_readers[block] = self.num_readers.get(block, 0) + 1
            elif event.kind == "evict":
                assert self.published.pop(block) == event.domain
            elif event.kind == "free":
                assert self.owner[block] == event.domain
                self.num_readers[block] -= 1
                if not self.num_readers[block]:
                    del self.owner[block]
            elif event.kind == "scrub":
                assert block not in self.owner
                assert block not in self.published
                del self.last_owner[block]
            elif event.kind == "seal":
                assert self.owner[block] == event.domain
                assert self.num_readers[block] == 1

    def before_launch(self, evidence: StepEvidence) -> list[Violation]:
        assert len(evidence.slot_mapping) <= self.max_batched_tokens, "the budget was exceeded"
        assert len(evidence.sequence_ids) <= self.max_num_seqs, "too many rows"
        assert len(set(evidence.slot_mapping.tolist())) == len(evidence.slot_mapping), "two tokens share a slot"
        for index, domain in enumerate(evidence.domains):
            blocks = [block for block in evidence.block_tables[index].tolist() if block >= 0]
            assert all(self.owner[block] == domain for block in blocks), "a foreign block"
            written = evidence.slot_mapping[evidence.cu_seqlens[index] : evidence.cu_seqlens[index + 1]]
            targets = {slot // self.block_size for slot in written.tolist()}
            assert targets <= set(blocks)
            assert all(self.num_readers[block] == 1 and block not in self.published for block in targets), "shared"
        self.evidence.append(evidence)
        violations, self.violations = self.violations, []
        return violations

    def counters(self) -> dict[str, int]:
        return {"num_steps": len(self.evidence)}


def integer_core(
    *,
    num_blocks: int = 16,
    block_size: int = 2,
    max_batched_tokens: int = 8,
    max_num_seqs: int = 4,
    max_waiting: int = 100,
    scheduling: str = "fair",
    wait_max_tokens: int = WAIT_MAX_TOKENS,
    max_prompt_tokens: int = 0,
    break_off_percent: int = 0,
    prefix_cache: bool = True,
    context_max: int = 1000,
    cache_floor_percent: int = 0,
    cache_ceiling_percent: int = 100,
    model_digest: str = "integers",
    observer: Observer | None = None,
    runner_class: type[IntegerRunner] = IntegerRunner,
) -> tuple[EngineCore, IntegerRunner]:
    """An engine on the integer model."""
    runner = runner_class(num_blocks, block_size)
    core = EngineCore(
        runner,
        decode=decode,
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
        context_max=context_max,
        vocab_size=VOCAB_SIZE,
        max_batched_tokens=max_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_waiting=max_waiting,
        observer=observer or Watcher(max_batched_tokens, max_num_seqs, block_size),
        scheduling=scheduling,
        wait_max_tokens=wait_max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        break_off_percent=break_off_percent,
        prefix_cache=prefix_cache,
        cache_floor_percent=cache_floor_percent,
        cache_ceiling_percent=cache_ceiling_percent,
        model_digest=model_digest,
    )
    return core, runner


def submit(
    sequence_id: str,
    prompt: list[int],
    max_tokens: int,
    *,
    domain: str = "a",
    stop: tuple[str, ...] = (),
    salt: bytes = b"salt",
    tier: str = "default",
) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=stop)
    return Submit(sequence_id, domain, salt, prompt, sampling, priority=TIERS[tier])
