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


@dataclass(slots=True)
class Schedule:
    budget: int  # tokens that nobody has got yet
    rows: list[ScheduledRow] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    too_long: list[Sequence] = field(default_factory=list)  # failed: they fit no more, since blocks were quarantined
    closed_rank: int = BATCH - 1  # nobody of this rank or below is admitted any more

    def close(self, rank: int) -> None:
        self.closed_rank = max(self.closed_rank, rank)

    def drop(self, sequence: Sequence) -> None:
        """Take back what the sequence has got in this step."""
        for row in self.rows:
            if row.sequence is sequence:
                self.rows.remove(row)
                self.budget += row.num_new_tokens
                return

    def share(self, sequence: Sequence) -> int:
        """The tokens that it can get now: all that it misses, cut into the budget, and where its prompt is being scored
        into what is left of SCORED_TOKENS_MAX. One at least while there is budget: nobody waits for the scored, and a
        step looks at the logits of at most SCORED_TOKENS_MAX positions and one of each row."""
        num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, self.budget)
        if not sequence.num_unscored or num_tokens <= 1:
            return num_tokens
        taken = sum(row.num_new_tokens for row in self.rows if row.sequence.num_unscored)
        return min(num_tokens, max(1, SCORED_TOKENS_MAX - taken))
