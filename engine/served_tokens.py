"""How much each domain was served: virtual token counters (VTC, arXiv 2401.00588), the only clock of scheduling.

A domain's counter grows by the tokens of its sequences, divided by their weight: all known tokens when a sequence is
admitted, one by one those that it generates. Tokens found in the prefix cache count like computed ones, so that a hit
never moves a domain before another; tokens computed again after a preemption do not count twice.

A domain that had nothing waiting starts again no lower than the lowest that has (the lift): nobody saves up service by
staying away. While two domains always have more waiting than a step admits, their counters differ by at most M, the
tokens of all sequences that have been admitted and have not ended, so what they are served over any time differs by
at most 2 M (theorem 4.4 there). Without shared blocks and preemption M is the pool's slots.
"""

from collections.abc import Iterable

_UNIT = 1 << 20  # counters are integers: tokens * _UNIT // weight


class ServedTokens:
    def __init__(self) -> None:
        self.total = 0  # tokens of everybody
        self.last_domain = ""  # that was admitted last
        self._counters: dict[str, int] = {}
        self._left_at = 0  # counter of the domain whose last waiting sequence was admitted last

    def of(self, domain: str) -> int:
        return self._counters.get(domain, 0)

    def lift(self, domain: str, waiting: Iterable[str]) -> None:
        """``domain``, which has nothing waiting, is about to have; ``waiting``: the domains that have."""
        lowest = min((self.of(other) for other in waiting), default=self._left_at)
        self._counters[domain] = max(self.of(domain), lowest)

    def charge(self, domain: str, num_tokens: int, weight: int) -> None:
        self.total += num_tokens
        self._counters[domain] = self.of(domain) + num_tokens * _UNIT // max(1, weight)

    def admitted(self, domain: str, *, last: bool) -> None:
        self.last_domain = domain
        if last:
            self._left_at = self.of(domain)

    def forget(self) -> None:
        """Nobody is here any more: nobody is owed anything."""
        self._counters.clear()
        self._left_at = 0
