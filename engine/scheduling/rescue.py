"""The hard bound on waiting, over all tiers and policies. No clock: waits are counted in tokens served to everybody.

A sequence starves when it has got no new token computed for ``wait_max_tokens``, wherever it is: waiting, preempted, or
in a row that gets no budget. Once in ``wait_max_tokens`` one starving sequence is rescued: it ranks above every tier
until it ends, so it is admitted at once (rows and blocks are taken from others) and never preempted for another tier.
Domains take turns, the one rescued longest ago first; within a domain it is whoever has starved longest.

So with D domains that have starving sequences, and k in its own domain that have starved longer, a sequence is
rescued at the latest (1 + (k + 1) D) wait_max_tokens after its last progress. Turns and rate keep this from being a way
in: of a flood one sequence is rescued each wait_max_tokens at most, and its domain's counter is charged as ever.
"""

from collections.abc import Iterable

from engine.scheduling.tiers import RESCUED
from engine.sequence import Sequence


class Rescue:
    def __init__(self, wait_max_tokens: int) -> None:
        self.num_rescued = 0
        self._wait_max_tokens = wait_max_tokens
        self._not_before = 0  # tokens served in all; nobody can be rescued earlier
        self._turns: dict[str, int] = {}  # domain -> when it was rescued last, counted in rescues

    def next(self, unfinished: Iterable[Sequence], served_total: int) -> Sequence | None:
        """Who is to be rescued now. Looks at everybody only when somebody can have starved since the last look."""
        if served_total < self._not_before:
            return None
        starving: list[Sequence] = []
        oldest = served_total
        domains: set[str] = set()
        for sequence in unfinished:
            domains.add(sequence.domain)
            if sequence.rank == RESCUED:
                continue
            if served_total - sequence.served_at_progress >= self._wait_max_tokens:
                starving.append(sequence)
            else:
                oldest = min(oldest, sequence.served_at_progress)
        self._turns = {domain: turn for domain, turn in self._turns.items() if domain in domains}
        if not starving:
            self._not_before = oldest + self._wait_max_tokens
            return None
        chosen = min(starving, key=lambda s: (self._turns.get(s.domain, 0), s.served_at_progress, s.arrival))
        self.num_rescued += 1
        self._turns[chosen.domain] = self.num_rescued
        self._not_before = served_total + self._wait_max_tokens
        return chosen
