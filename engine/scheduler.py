"""Each step hands out one budget of tokens so that every sequence's num_computed_tokens catches up with its num_tokens.

1. Running sequences first: those that decode, a chunk of one token each; then prompts, cut into what is left.
2. Where the pool is empty, the youngest running sequence is preempted: its blocks go, its tokens stay, and what is not
   found in the prefix cache later is computed again. It keeps its place: preempted sequences are admitted before any
   waiting one.
3. Then, only if nothing was preempted, preempted and waiting sequences are admitted while budget, rows and blocks
   last; engine/order.py says who is next. A sequence is admitted with blocks for all its known tokens, so a half-read
   prompt never starves on blocks. Full blocks of its beginning that its own domain has published are shared instead of
   computed; at least its last token is always computed.

Progress: the oldest running sequence is never a victim while a younger one runs, and an accepted sequence fits into
the pool alone. So the oldest always finishes, and so does everybody in turn.
"""

from bisect import insort
from collections.abc import Sequence as Line
from dataclasses import dataclass, field

from engine.block_pool import BlockPool
from engine.errors import OutOfBlocksError
from engine.order import Policy, decodes_first, youngest
from engine.sequence import Event, Sequence
from engine.served_tokens import ServedTokens


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    sequence: Sequence
    num_new_tokens: int  # tokens computed in this step, from num_computed_tokens on


@dataclass(slots=True)
class Schedule:
    rows: list[ScheduledRow] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    too_long: list[Sequence] = field(default_factory=list)  # failed: they fit no more, since blocks were quarantined


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_batched_tokens: int,
        max_num_seqs: int,
        context_max: int,
        policy: Policy,
        prefix_cache: bool = True,
    ) -> None:
        self.running: list[Sequence] = []  # all three in order of arrival
        self.preempted: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self._pool = pool
        self._block_size = block_size
        self._max_batched_tokens = max_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._context_max = context_max
        self._policy = policy
        self._prefix_cache = prefix_cache
        self.served = ServedTokens()
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    @property
    def num_unfinished(self) -> int:
        return len(self.running) + len(self.preempted) + len(self.waiting)

    def can_ever_fit(self, sequence: Sequence) -> bool:
        """Whether the sequence, alone, could reach its max_tokens. The last token's key is never stored."""
        num_tokens = sequence.num_prompt_tokens + sequence.sampling.max_tokens
        return num_tokens <= self._context_max and self._num_blocks_for(num_tokens - 1) <= self._pool.num_usable

    def add(self, sequence: Sequence) -> None:
        domains = {other.domain for other in self.waiting}
        if sequence.domain not in domains:
            self.served.lift(sequence.domain, domains)
        sequence.served_at_arrival = self.served.total
        insort(self.waiting, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has just finished, wherever it is, and give its blocks and row back."""
        for line in (self.running, self.preempted, self.waiting):
            if sequence in line:
                line.remove(sequence)
        self._release(sequence)
        if not self.num_unfinished:
            self.served.forget()

    def schedule(self) -> Schedule:
        """Decide one step. Blocks for every row's tokens are allocated when this returns."""
        plan = Schedule()
        budget = self._max_batched_tokens
        for sequence in decodes_first(self.running):
            if budget == 0:
                break
            if sequence not in self.running:
                continue  # a victim of an older one
            num_new_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            if self._make_room(sequence, num_new_tokens, plan):
                plan.rows.append(ScheduledRow(sequence, num_new_tokens))
                self._charge(sequence)
                budget -= num_new_tokens
        while budget > 0 and not plan.preempted and len(self.running) < self._max_num_seqs:
            candidate = self._next_candidate()
            if candidate is None or not self._admit(candidate, plan):
                break
            num_new_tokens = min(candidate.num_tokens - candidate.num_computed_tokens, budget)
            plan.rows.append(ScheduledRow(candidate, num_new_tokens))
            budget -= num_new_tokens
        return plan

    def _next_candidate(self) -> Sequence | None:
        if self.preempted:
            return self.preempted[0]
        return self._policy(self.waiting, self.served) if self.waiting else None

    def _admit(self, sequence: Sequence, plan: Schedule) -> bool:
        shared = self._published_prefix(sequence)
        try:
            self._grow(sequence, sequence.num_tokens, shared)
        except OutOfBlocksError:
            if self.running:
                return False
            self._give_up(sequence, plan)  # alone and still no room: blocks were quarantined
            return False
        (self.preempted if sequence in self.preempted else self.waiting).remove(sequence)
        self._charge(sequence)
        self.served.admitted(sequence.domain, last=all(other.domain != sequence.domain for other in self.waiting))
        sequence.num_computed_tokens = len(shared) * self._block_size
        sequence.apply(Event.ADMIT)
        sequence.row = self._free_rows.pop()
        insort(self.running, sequence, key=_arrival)
        plan.admitted.append(sequence)
        return True

    def _charge(self, sequence: Sequence) -> None:
        self.served.charge(sequence.domain, sequence.num_tokens - sequence.num_charged_tokens, sequence.weight)
        sequence.num_charged_tokens = sequence.num_tokens

    def _make_room(self, sequence: Sequence, num_new_tokens: int, plan: Schedule) -> bool:
        """Get blocks for a running sequence, preempting from the young end. False: it was itself preempted or given
        up."""
        while True:
            try:
                self._grow(sequence, sequence.num_computed_tokens + num_new_tokens)
            except OutOfBlocksError:
                if len(self.running) == 1:
                    self._give_up(sequence, plan)
                    return False
                victim = youngest(self.running)
                self._preempt(victim, plan)
                if victim is sequence:
                    return False
            else:
                return True

    def _grow(self, sequence: Sequence, num_tokens: int, shared: Line[int] = ()) -> None:
        missing = self._num_blocks_for(num_tokens) - len(sequence.block_ids) - len(shared)
        if missing > 0:
            sequence.block_ids += self._pool.allocate(
                missing, domain=sequence.domain, sequence_id=sequence.sequence_id, shared=shared
            )

    def _published_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the sequence's beginning, as far as they can be shared; never its last token."""
        shared: list[int] = []
        if self._prefix_cache:
            for index in range((sequence.num_tokens - 1) // self._block_size):
                block_id = self._pool.find(sequence.prefix(index, self._block_size))
                if block_id is None:
                    break
                shared.append(block_id)
        return shared

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _preempt(self, victim: Sequence, plan: Schedule) -> None:
        victim.apply(Event.PREEMPT)
        self.running.remove(victim)
        self._release(victim)
        victim.num_computed_tokens = 0
        insort(self.preempted, victim, key=_arrival)
        plan.preempted.append(victim)
        self.num_preemptions += 1

    def _give_up(self, sequence: Sequence, plan: Schedule) -> None:
        sequence.fail("too_long")
        self.remove(sequence)
        plan.too_long.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_ids, sequence_id=sequence.sequence_id)
        sequence.block_ids = []
        if sequence.row >= 0:
            self._free_rows.append(sequence.row)
            sequence.row = -1
