"""How much each domain was served: virtual token counters (VTC, arXiv 2401.00588), the only clock of scheduling.

A domain has one counter in each tier. It grows by the tokens of its sequences there, divided by their weight: all known
tokens when a sequence is admitted, one by one those that it generates. Tokens found in the prefix cache count like
computed ones, so that a hit never moves a domain before another; tokens computed again after a preemption do not count
twice.

A domain that had nothing waiting in a tier starts again no lower than the lowest that has (the lift): nobody saves up
service by staying away, nor by keeping a request in a tier that gets nothing. While two domains always have more
waiting in a tier than a step admits, their counters differ by at most M, the tokens of all sequences that have been
admitted and have not ended, so what they are served over any time differs by at most 2 M (theorem 4.4 there). Without
shared blocks and preemption M is the pool's slots. Where one enters past another without room
(engine/scheduling/order.py), the counters may differ by 2 M; a rescue (engine/scheduling/rescue.py) may add one
sequence's tokens. A domain that is owed first tokens (engine/scheduling/first_tokens.py) is not backlogged: it may pass
one that is, and gets no further ahead of it than the most served domain is, and its own sequences' tokens.

Tokens that were thrown away for a domain (engine/scheduling/break_off.py) are an account of their own, which goes down
as the lowest counter of those that wait goes up: so no more is thrown away for a domain than each of the others is
served, and what the counters' spread allows. It decides whether a step is broken off, and nothing else: nobody waits
longer for ordinary service because a step was once broken off for him.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Line

_UNIT = 1 << 20  # counters are integers: tokens * _UNIT // weight


class ServedTokens:
    def __init__(self) -> None:
        self.total = 0  # tokens of everybody
        self.last_domain = ""  # that was admitted last
        self._counters: dict[tuple[int, str], int] = {}  # by tier and domain
        self._made_up_at: dict[tuple[int, str], int] = {}  # where the lowest counter makes up for a domain's losses
        self._left_at: dict[int, int] = {}  # by tier: counter of the domain whose last waiting one was admitted last

    def of(self, tier: int, domain: str) -> int:
        return self._counters.get((tier, domain), 0)

    def num_ahead(self, tier: int, domain: str, other: str) -> int:
        """Tokens for each unit of weight that ``domain`` has been served more than ``other``."""
        return (self.of(tier, domain) - self.of(tier, other)) // _UNIT

    def lift(self, tier: int, domain: str, waiting: Iterable[str]) -> None:
        """``domain``, which has nothing waiting in the tier, is about to have; ``waiting``: the domains that have."""
        self._counters[tier, domain] = self.lifted(tier, domain, waiting)

    def lifted(self, tier: int, domain: str, waiting: Iterable[str]) -> int:
        """Where the counter would be then."""
        return max(self.of(tier, domain), self._lowest(tier, waiting))

    def _lowest(self, tier: int, waiting: Iterable[str]) -> int:
        return min((self.of(tier, other) for other in waiting), default=self._left_at.get(tier, 0))

    def charge(self, tier: int, domain: str, num_tokens: int, weight: int) -> None:
        self.total += num_tokens
        self._counters[tier, domain] = self.of(tier, domain) + num_tokens * _UNIT // max(1, weight)

    def lose(self, tier: int, domain: str, num_tokens: int, weight: int, waiting: Iterable[str]) -> None:
        """Tokens were thrown away for the domain."""
        key, lowest = (tier, domain), self._lowest(tier, waiting)
        self._made_up_at[key] = max(self._made_up_at.get(key, 0), lowest) + num_tokens * _UNIT // max(1, weight)

    def with_losses(self, tier: int, domain: str, waiting: Line[str]) -> int:
        """Where the counter would be after a lift, and further by the losses for which others were not served since."""
        not_made_up = max(0, self._made_up_at.get((tier, domain), 0) - self._lowest(tier, waiting))
        return self.lifted(tier, domain, waiting) + not_made_up

    def admitted(self, tier: int, domain: str, *, last: bool) -> None:
        self.last_domain = domain
        if last:
            self._left_at[tier] = self.of(tier, domain)

    def forget(self) -> None:
        """Nobody is here any more: nobody is owed anything."""
        self._made_up_at.clear()
        self._counters.clear()
        self._left_at.clear()
