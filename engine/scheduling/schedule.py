"""What one step is to do: which sequences get how many tokens, who enters and who makes way."""

from dataclasses import dataclass, field

from engine.scheduling.tiers import BATCH
from engine.sequence import Sequence

# Prompt positions whose logits one step looks at. Each holds a float for every token of the vocabulary and costs about
# a millisecond of sampling, for which everybody in the step waits.
SCORED_TOKENS_MAX = 64


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    sequence: Sequence
    num_new_tokens: int  # tokens computed in this step, from num_computed_tokens on

    @property
    def num_missing(self) -> int:
        """Tokens of its sequence that are not computed after this step."""
        return self.sequence.num_tokens - self.sequence.num_computed_tokens - self.num_new_tokens

    @property
    def is_owed(self) -> bool:
        """It is owed its first token, and has not got it."""
        return self.sequence.owed and not self.sequence.num_completion_tokens


@dataclass(slots=True)
class Schedule:
    budget: int  # tokens that nobody has got yet
    prompt_budget: int = -1  # of those, what prompts may still have: all, unless the scheduler says less
    rows: list[ScheduledRow] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    too_long: list[Sequence] = field(default_factory=list)  # failed: they fit no more, since blocks were quarantined
    closed_rank: int = BATCH - 1  # nobody of this rank or below is admitted any more
    alone: bool = False  # the step is for owed first tokens, see `hurry`

    def __post_init__(self) -> None:
        if self.prompt_budget < 0:
            self.prompt_budget = self.budget

    def close(self, rank: int) -> None:
        self.closed_rank = max(self.closed_rank, rank)

    def give(self, sequence: Sequence, num_new_tokens: int) -> None:
        self.rows.append(ScheduledRow(sequence, num_new_tokens))
        self._spend(sequence, num_new_tokens)

    def drop(self, sequence: Sequence) -> None:
        """Take back what the sequence has got in this step."""
        for row in self.rows:
            if row.sequence is sequence:
                self.rows.remove(row)
                self._spend(sequence, -row.num_new_tokens)
                return

    def hurry(self, rank: int, *, alone: bool) -> bool:
        """Where a first token of this rank is owed and can come with this step, no prompt of its rank or below delays
        it, and with ``alone`` nobody else of its tier or below: they lose this step, and no work. False: none can."""
        owed = [row for row in self.rows if row.sequence.rank == rank and row.is_owed]
        others = [row for row in self.rows if row.sequence.tier <= rank and row not in owed] if alone else []
        budget = self.budget + sum(row.num_new_tokens for row in others)
        if not any(row.num_missing <= (0 if row.sequence.num_unscored else budget) for row in owed):
            return False
        self.alone = alone
        self.prompt_budget = 0
        for row in others:
            self.drop(row.sequence)
        for row in owed:
            if row.num_missing and not row.sequence.num_unscored:
                self.drop(row.sequence)
                self.give(row.sequence, min(row.num_new_tokens + row.num_missing, self.budget))
        return True

    def share(self, sequence: Sequence) -> int:
        """The tokens that it can get now: all that it misses, cut into the budget, and where its prompt is being scored
        into what is left of SCORED_TOKENS_MAX. One at least while there is budget: nobody waits for the scored, and a
        step looks at the logits of at most SCORED_TOKENS_MAX positions and one of each row."""
        num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, self.budget)
        if num_tokens > 1 and not sequence.owed:
            num_tokens = min(num_tokens, max(0, self.prompt_budget))
        if not sequence.num_unscored or num_tokens <= 1:
            return num_tokens
        taken = sum(row.num_new_tokens for row in self.rows if row.sequence.num_unscored)
        return min(num_tokens, max(1, SCORED_TOKENS_MAX - taken))

    def _spend(self, sequence: Sequence, num_tokens: int) -> None:
        self.budget -= num_tokens
        if sequence.num_tokens - sequence.num_computed_tokens > 1:
            self.prompt_budget -= num_tokens
