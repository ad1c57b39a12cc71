"""Each step hands out one budget of tokens so that every sequence's num_computed_tokens catches up with its num_tokens.

Sequences have a rank: their service tier, or above all tiers once they have waited too long
(engine/scheduling/rescue.py). Highest first; within a rank engine/scheduling/order.py says who is next.

1. Running sequences that decode, one token each. Then, from rank to rank, the prompts of running sequences, cut into
   what is left (or max_prompt_tokens, where somebody decodes), and after them the preempted and waiting ones of that
   rank, while budget, rows and blocks last. Batch work comes after all that, decodes too. Budget that a lower rank got
   first is taken back where a higher one needs it. First of a rank come first tokens that are owed
   (engine/scheduling/first_tokens.py), and where one can come with this step, nothing else of its rank or below.
2. A sequence is admitted with blocks for all its known tokens, so a half-read prompt never starves on blocks. Full
   blocks of its beginning that its own domain has published are shared instead of computed, but for those whose
   numbers it needs itself (Sequence.num_tokens_shareable).
3. Who finds no room takes it from lower ranks: from the youngest of the lowest. For a row, the victim is preempted and
   keeps its blocks: it goes on later where it was. For blocks, the victim loses its own, and what is not found in the
   prefix cache later is computed again; blocks that a preempted sequence keeps are taken like those of a running one. A
   running sequence that grows may take blocks from its own rank, too; who is youngest there gives way itself.
4. Preempted sequences keep their place: of one rank they are admitted before any waiting one but an owed one. A
   waiting one that is next and finds no room is passed over SKIPPED_MAX times while others of its rank fit, then nobody
   of its rank or below enters before it. No sequence is admitted in the step in which its rank or a higher one lost
   blocks.

Work conservation: when a step ends with budget for prompts and a row left and nobody lost blocks in it, no waiting
sequence fits, but for those behind a preempted sequence or one that may not be passed over (order.may_be_skipped,
order.may_pass).

Progress: the oldest running sequence of the highest rank is never a victim while another holds blocks, and an accepted
sequence fits into the pool alone. So it always finishes, and so does everybody in turn; between ranks
engine/scheduling/rescue.py bounds the wait.
"""

from bisect import insort
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Line

from engine.cache.block_pool import BlockPool
from engine.protocol import Submit
from engine.scheduling import first_tokens
from engine.scheduling.first_tokens import ALONE_MAX, OWED_RANKS, RowShares
from engine.scheduling.order import WAIT_MAX_TOKENS, Outlook, Policy, fair, fcfs, first_to_go, may_be_skipped, may_pass
from engine.scheduling.rescue import Rescue
from engine.scheduling.room import Room
from engine.scheduling.schedule import Schedule
from engine.scheduling.tiers import BATCH, RANKS, RESCUED
from engine.sequence import COMPLETE, Event, Sequence, Status


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _by_rank(sequence: Sequence) -> int:
    return -sequence.rank


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
        wait_max_tokens: int = WAIT_MAX_TOKENS,
        max_prompt_tokens: int = 0,
    ) -> None:
        self.running: list[Sequence] = []  # all three in order of arrival
        self.preempted: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self.num_preemptions_kept = 0  # of those, the ones that kept their blocks
        self.rescue = Rescue(wait_max_tokens)
        self.outlook = Outlook(pool.num_blocks * block_size, wait_max_tokens)
        self.served = self.outlook.served
        self._pool = pool
        self._block_size = block_size
        self._max_batched_tokens = max_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._context_max = context_max
        self._max_prompt_tokens = max_prompt_tokens or max_batched_tokens
        self._policy = policy
        self._room = Room(pool, block_size, prefix_cache=prefix_cache)
        self._shares = RowShares(max_num_seqs)
        self._num_alone = 0  # steps in a row that were for owed first tokens alone
        self._num_waiting: Counter[tuple[int, str]] = Counter()  # by tier and domain
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    @property
    def num_unfinished(self) -> int:
        return len(self.running) + len(self.preempted) + len(self.waiting)

    def num_waiting_from(self, tier: int) -> int:
        """Waiting sequences of this tier and above: a queue of lower ones refuses nobody."""
        return sum(num for (other, _), num in self._num_waiting.items() if other >= tier)

    def can_ever_fit(self, submit: Submit) -> bool:
        """Whether its sequence, alone, could reach its max_tokens. The last token's key is never stored."""
        num_tokens = len(submit.prompt_token_ids) + submit.sampling.max_tokens
        return num_tokens <= self._context_max and self._room.num_blocks_for(num_tokens - 1) <= self._pool.num_promised

    def num_slots_empty(self) -> int:
        """Slots without a token in blocks that sequences hold. Only the one that writes a block has any in it."""
        return sum(len(s.block_ids) * self._block_size - s.num_computed_tokens for s in self._holders())

    def add(self, sequence: Sequence) -> None:
        tier, domain = sequence.tier, sequence.domain
        self._lift(tier, domain)
        self._num_waiting[tier, domain] += 1
        sequence.served_at_arrival = sequence.served_at_progress = self.served.total
        insort(self.waiting, sequence, key=_arrival)
        self._shares.add(sequence)

    def is_owed_now(self, sequence: Sequence) -> bool:
        """Whether one that has just come, and is not added yet, would have its first token with the next step, before
        all others of its tier and below. Its prompt must fit into a step."""
        tier = sequence.tier
        if tier not in OWED_RANKS or self._policy is not fair or sequence.num_unscored:
            return False
        if any(one.tier > tier for one in self._everybody()) or not self._room.fits(sequence):
            return False
        domains = self._domains_waiting(tier)
        return first_tokens.would_be_owed(sequence, self.waiting, domains, self.running, self._shares, self.outlook)

    def charge_domain(self, sequence: Sequence, num_tokens: int) -> None:
        """For the first token of one that has just come, and is not added yet, these tokens were thrown away."""
        tier = sequence.tier
        self.served.lose(tier, sequence.domain, num_tokens, sequence.weight, self._domains_waiting(tier))

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has just finished, wherever it is, and give its blocks and row back."""
        if sequence in self.waiting:
            self._leave_waiting(sequence)
        for line in (self.running, self.preempted):
            if sequence in line:
                line.remove(sequence)
        self._release(sequence)
        self._leave_row(sequence)
        self._shares.remove(sequence)
        if sequence.status in COMPLETE:
            self.outlook.lengths.learn(sequence.domain, sequence.num_completion_tokens)
        if not self.num_unfinished:
            self.served.forget()

    def schedule(self) -> Schedule:
        """Decide one step. Blocks for every row's tokens are allocated when this returns."""
        plan = Schedule(self._max_batched_tokens)
        rescued = self.rescue.next(self._everybody(), self.served.total)
        if rescued is not None:
            rescued.rank = RESCUED
        decodes = [s for s in self.running if s.num_tokens - s.num_computed_tokens <= 1]
        prompts = [s for s in self.running if s.num_tokens - s.num_computed_tokens > 1]
        self._advance(sorted((s for s in decodes if s.rank > BATCH), key=_by_rank), plan)
        if plan.rows:
            plan.prompt_budget = self._max_prompt_tokens
        before_rescued = None
        if self._num_alone < ALONE_MAX:
            before_rescued = first_tokens.rank_before_rescued(self._everybody())
        hurries = before_rescued is not None and self._hurry(before_rescued, prompts, plan)
        for rank in () if hurries else RANKS:
            if rank == BATCH:
                self._advance([s for s in decodes if s.rank == BATCH], plan)
            if rank != before_rescued and self._hurry(rank, prompts, plan):
                break
            self._advance([s for s in prompts if s.rank == rank and not s.owed], plan)
            self._admit_rank(rank, plan)
        self._num_alone = self._num_alone + 1 if plan.alone else 0
        if not self.running and (self.preempted or self.waiting):
            self._insist(plan)
        for row in plan.rows:
            if row.sequence.num_computed_tokens + row.num_new_tokens > row.sequence.num_computed_max:
                row.sequence.served_at_progress = self.served.total
        return plan

    def _domains_waiting(self, tier: int) -> list[str]:
        return [domain for of, domain in self._num_waiting if of == tier]

    def _lift(self, tier: int, domain: str) -> None:
        if (tier, domain) not in self._num_waiting:
            self.served.lift(tier, domain, self._domains_waiting(tier))

    def _everybody(self) -> list[Sequence]:
        return [*self.running, *self.preempted, *self.waiting]

    def _hurry(self, rank: int, prompts: Line[Sequence], plan: Schedule) -> bool:
        """Serve what this rank is owed; whether the step is for that."""
        self._advance([s for s in prompts if s.rank == rank and s.owed], plan)
        self._admit_owed(rank, plan)
        return plan.hurry(rank, alone=self._num_alone < ALONE_MAX)

    # --- who gets tokens ----------------------------------------------------------------------------------------------

    def _advance(self, line: Iterable[Sequence], plan: Schedule) -> None:
        """Give each of these running sequences its next tokens."""
        for sequence in line:
            if sequence.status is not Status.RUNNING:
                continue  # a victim of one before it
            if not self._find_budget(sequence.rank, plan):
                return
            num_new_tokens = plan.share(sequence)
            if not num_new_tokens:
                return
            if self._make_room(sequence, num_new_tokens, plan):
                self._give(sequence, num_new_tokens, plan)

    def _has_budget(self, rank: int, plan: Schedule) -> bool:
        """Whether somebody of this rank can get a token: what a lower rank got in this step can be taken back."""
        return plan.budget > 0 or any(row.sequence.rank < rank for row in plan.rows)

    def _find_budget(self, rank: int, plan: Schedule) -> bool:
        if plan.budget == 0 and self._has_budget(rank, plan):
            plan.drop(first_to_go(row.sequence for row in plan.rows)[0])
        return plan.budget > 0

    def _give(self, sequence: Sequence, num_new_tokens: int, plan: Schedule) -> None:
        plan.give(sequence, num_new_tokens)
        self._charge(sequence)

    def _charge(self, sequence: Sequence) -> None:
        num_tokens = sequence.num_tokens - sequence.num_charged_tokens
        self.served.charge(sequence.tier, sequence.domain, num_tokens, sequence.weight)
        sequence.num_charged_tokens = sequence.num_tokens

    # --- who enters ---------------------------------------------------------------------------------------------------

    def _admit_owed(self, rank: int, plan: Schedule) -> None:
        """Whose first token is owed, before anybody else of their rank, into the rows of who was served most."""
        while rank in OWED_RANKS and self._policy is fair and rank > plan.closed_rank and self._has_budget(rank, plan):
            domains = self._domains_waiting(rank)
            over = first_tokens.most_served_over(rank, self.running, self._shares, self.outlook) if domains else None
            if over is None:
                return
            candidate = first_tokens.next_owed(rank, self.waiting, domains, over, self._shares, self.outlook)
            if candidate is None or not (self._room.fits(candidate) or self._take_room(candidate, plan)):
                return
            self._find_budget(rank, plan)
            candidate.owed = True
            self._admit(candidate, plan, instead_of=over)

    def _admit_rank(self, rank: int, plan: Schedule) -> None:
        while (
            rank > plan.closed_rank
            and plan.prompt_budget > 0
            and self._has_row_for(rank)
            and self._has_budget(rank, plan)
        ):
            candidate = self._choose(rank, plan)
            if candidate is None:
                return
            self._find_budget(rank, plan)
            self._admit(candidate, plan)

    def _has_row_for(self, rank: int) -> bool:
        if len(self.running) < self._max_num_seqs:
            return True
        return any(sequence.rank < rank for sequence in self.running)

    def _choose(self, rank: int, plan: Schedule) -> Sequence | None:
        """Who of this rank is next, with room for its blocks. None: nobody."""
        preempted = [sequence for sequence in self.preempted if sequence.rank == rank]
        for sequence in preempted:
            if self._room.fits(sequence):
                return sequence
        waiting = [sequence for sequence in self.waiting if sequence.rank == rank]
        if not preempted and not waiting:
            return None
        head = preempted[0] if preempted else self._next(waiting)
        if self._room.fits(head) or self._take_room(head, plan):
            return head
        if preempted or not may_be_skipped(head, self._policy, self.outlook):
            plan.close(rank)
            return None
        passing = (s for s in waiting if may_pass(s, head, self._policy, self.outlook))
        fitting = [sequence for sequence in passing if self._room.fits(sequence)]
        if not fitting:
            return None
        head.num_skipped += 1
        return self._next(fitting)

    def _next(self, waiting: Line[Sequence]) -> Sequence:
        return (fcfs if waiting[0].rank == RESCUED else self._policy)(waiting, self.outlook)

    def _admit(self, sequence: Sequence, plan: Schedule, instead_of: str = "") -> None:
        """Into a row, with blocks for all its tokens: the pool has them. Where no row is free, into that of a lower
        rank or of the domain ``instead_of``."""
        if len(self.running) == self._max_num_seqs:
            victim = first_to_go(self.running)[0]
            if victim.rank == sequence.rank:
                victim = first_to_go(s for s in self.running if s.rank == victim.rank and s.domain == instead_of)[0]
            self._preempt(victim, plan)
            self.num_preemptions_kept += 1
        if sequence.status is Status.PREEMPTED:
            self.preempted.remove(sequence)
        else:
            self._leave_waiting(sequence)
        self._room.enter(sequence)
        sequence.apply(Event.ADMIT)
        sequence.row = self._free_rows.pop()
        insort(self.running, sequence, key=_arrival)
        plan.admitted.append(sequence)
        self._give(sequence, plan.share(sequence), plan)
        last = (sequence.tier, sequence.domain) not in self._num_waiting
        self.served.admitted(sequence.tier, sequence.domain, last=last)

    def _insist(self, plan: Schedule) -> None:
        """Nobody runs and nobody found room. The first in line takes all that others keep; if that is not enough,
        blocks were quarantined and it will never fit."""
        rank = max(sequence.rank for sequence in (*self.preempted, *self.waiting))
        preempted = [sequence for sequence in self.preempted if sequence.rank == rank]
        first = preempted[0] if preempted else self._next([s for s in self.waiting if s.rank == rank])
        for keeper in first_to_go(s for s in self.preempted if s.block_ids and s is not first):
            if self._room.fits(first):
                break
            self._take_blocks(keeper, plan)
        if self._room.fits(first):
            self._admit(first, plan)
        else:
            self._give_up(first, plan)

    # --- who makes way ------------------------------------------------------------------------------------------------

    def _holders(self) -> list[Sequence]:
        return self.running + [sequence for sequence in self.preempted if sequence.block_ids]

    def _make_room(self, sequence: Sequence, num_new_tokens: int, plan: Schedule) -> bool:
        """Get blocks for a running sequence, from whoever is first to go. False: that was itself, or it was alone."""
        num_tokens = sequence.num_computed_tokens + num_new_tokens
        while self._room.num_missing(sequence, num_tokens) > self._pool.num_available(sequence.domain):
            holders = first_to_go(self._holders())
            if len(holders) == 1:
                self._give_up(sequence, plan)
                return False
            self._take_blocks(holders[0], plan)
            if holders[0] is sequence:
                return False
        self._room.grow(sequence, num_tokens)
        return True

    def _take_room(self, sequence: Sequence, plan: Schedule) -> bool:
        """Take blocks from lower ranks for one that is to be admitted; from nobody if that would not be enough."""
        victims = first_to_go(holder for holder in self._holders() if holder.rank < sequence.rank)
        if not victims:
            return False
        shared = set() if sequence.block_ids else set(self._room.published_prefix(sequence))
        taken = [block_id for victim in victims for block_id in victim.block_ids if block_id not in shared]
        if self._room.num_needed(sequence) > self._pool.num_attainable(sequence.domain, taken):
            return False
        for victim in victims:
            self._take_blocks(victim, plan)
            if self._room.fits(sequence):
                return True
        return False

    def _take_blocks(self, victim: Sequence, plan: Schedule) -> None:
        if victim.status is Status.RUNNING:
            self._preempt(victim, plan)
        self._release(victim)
        victim.num_computed_tokens = 0
        plan.close(victim.rank)

    def _preempt(self, victim: Sequence, plan: Schedule) -> None:
        victim.apply(Event.PREEMPT)
        plan.drop(victim)
        self.running.remove(victim)
        self._leave_row(victim)
        insort(self.preempted, victim, key=_arrival)
        plan.preempted.append(victim)
        if victim in plan.admitted:
            plan.admitted.remove(victim)
        self.num_preemptions += 1

    def _give_up(self, sequence: Sequence, plan: Schedule) -> None:
        sequence.fail("too_long")
        self.remove(sequence)
        plan.too_long.append(sequence)

    # --- lines and rows -----------------------------------------------------------------------------------------------

    def _leave_waiting(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        key = sequence.tier, sequence.domain
        self._num_waiting[key] -= 1
        if not self._num_waiting[key]:
            del self._num_waiting[key]

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_ids, sequence_id=sequence.sequence_id)
        sequence.block_ids = []

    def _leave_row(self, sequence: Sequence) -> None:
        if sequence.row >= 0:
            self._free_rows.append(sequence.row)
            sequence.row = -1
