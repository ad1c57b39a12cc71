"""Valid traces of a paged engine, for the isolation auditor: a model engine that is small enough to be right.

A trace is a list of Happenings: block events in order, and the arrays of each step. The model engine admits sequences
in several domains, shares published blocks, feeds prompts in chunks, decodes, preempts, aborts, scrubs blocks that
change domain, and packs all rows into one batch. Faults are made by editing a valid trace; see test_isolation.py.
"""

from dataclasses import dataclass, field, replace
from random import Random

import numpy as np

from audit.runtime.isolation import IsolationAuditor, Violation


@dataclass(frozen=True)
class Event:
    kind: str
    step: int
    block_id: int
    generation: int
    domain: str
    sequence_id: str
    token_ids: tuple[int, ...] = ()
    cache_salt: bytes = b""


@dataclass(frozen=True)
class Step:
    step: int
    sequence_ids: list[str]
    domains: list[str]
    token_ids: np.ndarray
    cu_seqlens: np.ndarray
    kv_lens: np.ndarray
    block_tables: np.ndarray
    slot_mapping: np.ndarray

    def copy(self) -> "Step":
        return replace(
            self,
            sequence_ids=list(self.sequence_ids),
            domains=list(self.domains),
            token_ids=self.token_ids.copy(),
            cu_seqlens=self.cu_seqlens.copy(),
            kv_lens=self.kv_lens.copy(),
            block_tables=self.block_tables.copy(),
            slot_mapping=self.slot_mapping.copy(),
        )


Happening = Event | Step


@dataclass
class _Sequence:
    sequence_id: str
    domain: str
    salt: bytes
    tokens: list[int]  # all that it will ever compute
    num_prompt: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


class ModelEngine:
    def __init__(self, random: Random, *, num_blocks: int, block_size: int, num_domains: int) -> None:
        self.random, self.num_blocks, self.block_size = random, num_blocks, block_size
        self.domains = [f"d{i}" for i in range(num_domains)]
        self.free = list(range(num_blocks))
        self.generation = [0] * num_blocks
        self.content = [""] * num_blocks
        self.live: list[_Sequence] = []
        self.holders: dict[int, int] = {}
        self.published: dict[int, tuple[object, ...]] = {}  # block -> domain, salt, all tokens up to its end
        self.step = self.num_sequences = 0
        self.trace: list[Happening] = []

    def run(self, num_steps: int) -> list[Happening]:
        for _ in range(num_steps):
            self.step += 1
            self.turn()
        return self.trace

    def turn(self) -> None:
        random = self.random
        if len(self.live) < 6 and random.random() < 0.5:
            self.live.append(self.begin())
        if self.live and random.random() < 0.1:  # preempt: computed again from the start
            victim = random.choice(self.live)
            self.release(victim)
            victim.computed = 0
        if self.live and random.random() < 0.1:  # abort
            self.end(random.choice(self.live))
        rows = [(s, n) for s in random.sample(self.live, len(self.live)) if (n := self.grow(s))]
        if not rows:
            return
        kv = [s.computed + n for s, n in rows]
        width = max(len(s.blocks) for s, _ in rows) + random.randint(0, 2)
        positions = [(s, p) for s, n in rows for p in range(s.computed, s.computed + n)]
        size = self.block_size
        self.trace.append(
            Step(
                self.step,
                [s.sequence_id for s, _ in rows],
                [s.domain for s, _ in rows],
                np.array([s.tokens[p] for s, p in positions], np.int64),
                np.cumsum([0, *(n for _, n in rows)], dtype=np.int32),
                np.array(kv, np.int32),
                np.array([s.blocks + [-1] * (width - len(s.blocks)) for s, _ in rows], np.int32),
                np.array([s.blocks[p // size] * size + p % size for s, p in positions], np.int64),
            )
        )
        for s, n in rows:
            for i in range(s.computed // size, (s.computed + n) // size):
                self.event("seal", s.blocks[i], s.domain, s.sequence_id)
                if random.random() < 0.8:
                    self.event("publish", s.blocks[i], s.domain, s.sequence_id)
                    self.published[s.blocks[i]] = self.prefix(s, i)
            s.computed += n
            if s.computed == len(s.tokens):
                self.end(s)

    def begin(self) -> _Sequence:
        """Half of all prompts begin with the same two blocks."""
        random, size = self.random, self.block_size
        prompt = list(range(2 * size)) if random.random() < 0.5 else []
        prompt += [random.randrange(9) for _ in range(random.randint(1, 3 * size))]
        tokens = prompt + [random.randrange(9) for _ in range(random.randint(0, size))]
        salt = random.choice([b"", b"salt"])
        s = _Sequence(f"s{self.num_sequences}", random.choice(self.domains), salt, tokens, len(prompt))
        self.num_sequences += 1
        self.trace.append(Event("begin", self.step, -1, 0, s.domain, s.sequence_id, tuple(prompt), salt))
        return s

    def end(self, s: _Sequence) -> None:
        self.release(s)
        self.live.remove(s)
        self.trace.append(Event("end", self.step, -1, 0, s.domain, s.sequence_id))

    def prefix(self, s: _Sequence, index: int) -> tuple[object, ...]:
        return (s.domain, s.salt, *s.tokens[: (index + 1) * self.block_size])

    def share(self, s: _Sequence) -> None:
        """Begin with published blocks, as many as there are and as the dice want; the last token is always computed."""
        known = max(s.num_prompt, s.computed)
        while (len(s.blocks) + 1) * self.block_size < known and self.random.random() < 0.9:
            wanted = self.prefix(s, len(s.blocks))
            block = next((b for b, prefix in self.published.items() if prefix == wanted), None)
            if block is None:
                return
            if block in self.free:
                self.free.remove(block)
            self.event("share", block, s.domain, s.sequence_id)
            self.holders[block] = self.holders.get(block, 0) + 1
            s.blocks.append(block)
            s.computed = len(s.blocks) * self.block_size

    def grow(self, s: _Sequence) -> int:
        """Give `s` blocks for some more tokens; how many tokens fit."""
        if not s.blocks:
            self.share(s)
        wanted = min(len(s.tokens) - s.computed, self.random.choice([1, 1, 3, self.block_size + 1]))
        while len(s.blocks) * self.block_size < s.computed + wanted and self.free:
            block = self.free.pop(self.random.randrange(len(self.free)))
            if self.published.pop(block, None):
                self.event("evict", block, self.content[block], "")
            if self.content[block] not in ("", s.domain) or self.random.random() < 0.1:
                self.event("scrub", block, "", "")
            self.generation[block] += self.random.choice([1, 1, 5])
            self.content[block] = s.domain
            self.holders[block] = 1
            self.event("allocate", block, s.domain, s.sequence_id)
            s.blocks.append(block)
        return min(wanted, len(s.blocks) * self.block_size - s.computed)

    def release(self, s: _Sequence) -> None:
        for block in reversed(s.blocks):
            self.event("free", block, s.domain, s.sequence_id)
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free.append(block)
        s.blocks = []

    def event(self, kind: str, block: int, domain: str, sequence_id: str) -> None:
        self.trace.append(Event(kind, self.step, block, self.generation[block], domain, sequence_id))


def audit(
    trace: list[Happening], *, num_blocks: int, block_size: int
) -> tuple[IsolationAuditor, list[list[Violation]]]:
    """What an auditor says, step by step."""
    auditor, found = IsolationAuditor(num_blocks, block_size), []
    for happening in trace:
        if isinstance(happening, Event):
            auditor.on_event(
                happening.kind,
                happening.step,
                happening.block_id,
                happening.generation,
                happening.domain,
                happening.sequence_id,
                happening.token_ids,
                happening.cache_salt,
            )
        else:
            found.append(check(auditor, happening))
    return auditor, found


def check(auditor: IsolationAuditor, step: Step) -> list[Violation]:
    return auditor.check_step(
        step=step.step,
        sequence_ids=step.sequence_ids,
        domains=step.domains,
        token_ids=step.token_ids,
        cu_seqlens=step.cu_seqlens,
        kv_lens=step.kv_lens,
        block_tables=step.block_tables,
        slot_mapping=step.slot_mapping,
    )
