"""When a step under way is broken off: somebody has come whose first token is owed, and would wait for its rest.

Between two layers the engine is asked whether to go on. A step that is broken off has written slots that nobody counts
and has changed nothing else; the next step serves what is owed, and then its work is done again, to the same bits.

What that may cost, whoever comes how often:

1. Nothing is broken off while somebody of a higher tier than the newcomer's is here, and no step that has a first token
   in it that is itself owed.
2. After a break the next step that is not for owed first tokens alone runs to its end: there is always progress.
3. Tokens thrown away (a step's tokens, times the share of its layers that were computed) are at most ``percent`` of the
   tokens of the steps that ran to their ends. Little of it can be saved up: SAVED_STEPS_MAX full steps.
4. They are charged to the domain that caused it, whatever becomes of the newcomer: about as many tokens as each other
   domain is served can be thrown away for one, in the same time. Its ordinary service does not suffer
   (engine/scheduling/served_tokens.py).
5. At most NEWCOMERS_MAX are looked at in a step: the others wait for its end, as all do without this.

The decision is made on what is known while the step runs: the newcomer has not been added yet, so that commands keep
their order and nothing moves under a running launch. It depends on how many tokens and sequences each domain has, on
when the newcomer came and on nothing that anybody else's tokens say.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.protocol import Submit
from engine.scheduling.schedule import Schedule
from engine.sequence import Sequence

GoOn = Callable[[float], bool]  # share of the layers that are computed -> whether to compute the next
Newcomers = Callable[[], Iterable[Submit]]  # who has come since it was last asked

SAVED_STEPS_MAX = 8
NEWCOMERS_MAX = 32


@dataclass(slots=True)
class BreakOffs:
    """``percent`` 0: no step is broken off. ``owed_now``: the sequence whose first token is owed with the next step;
    None where it is not, or would be refused. ``charge``: what was thrown away for a sequence, to its domain."""

    percent: int
    max_batched_tokens: int
    owed_now: Callable[[Submit], Sequence | None]
    charge: Callable[[Sequence, int], None]
    num_broken_off: int = 0
    num_tokens_lost: int = 0
    cause: Sequence | None = None  # for whom the step under way is to be broken off
    _saved: int = 0  # hundredths of a token that may be thrown away
    _is_repetition: bool = False  # the last step but those for owed first tokens was broken off

    def watch(self, plan: Schedule, newcomers: Newcomers | None) -> GoOn | None:
        """What a launch of this plan is to ask between its layers; None: it runs to its end."""
        self.cause = None
        if newcomers is None or not self._may_break(plan):
            return None
        return _Watch(self, plan, newcomers).go_on

    def ended(self, plan: Schedule) -> None:
        """A step ran to its end."""
        limit = 100 * SAVED_STEPS_MAX * self.max_batched_tokens
        self._saved = min(limit, self._saved + self.percent * _num_tokens(plan))
        self._is_repetition = self._is_repetition and plan.alone

    def broken(self, plan: Schedule, share: float) -> None:
        assert self.cause is not None, "a step was broken off for nobody"
        num_tokens = num_lost(plan, share)
        self._saved -= 100 * num_tokens
        self._is_repetition = True
        self.num_broken_off += 1
        self.num_tokens_lost += num_tokens
        self.charge(self.cause, num_tokens)

    def affords(self, num_tokens: int) -> bool:
        return 100 * num_tokens <= self._saved

    def _may_break(self, plan: Schedule) -> bool:
        if self._saved <= 0 or self._is_repetition or plan.alone or not plan.rows:
            return False
        return not any(row.is_owed for row in plan.rows)


@dataclass(slots=True)
class _Watch:
    """One launch, asked between its layers."""

    break_offs: BreakOffs
    plan: Schedule
    newcomers: Newcomers
    _num_seen: int = 0

    def go_on(self, share: float) -> bool:
        num_tokens = num_lost(self.plan, share)
        if self._num_seen == NEWCOMERS_MAX or not self.break_offs.affords(num_tokens):
            return True
        for submit in self.newcomers():
            if self._num_seen == NEWCOMERS_MAX:
                break
            self._num_seen += 1
            if len(submit.prompt_token_ids) > self.break_offs.max_batched_tokens:
                continue  # its first token takes several steps
            sequence = self.break_offs.owed_now(submit)
            if sequence is not None:
                self.break_offs.cause = sequence
                return False
        return True


def _num_tokens(plan: Schedule) -> int:
    return sum(row.num_new_tokens for row in plan.rows)


def num_lost(plan: Schedule, share: float) -> int:
    """Tokens that are thrown away after this share of the layers. At least one, so that nothing is broken off for
    nothing."""
    return max(1, round(share * _num_tokens(plan)))
