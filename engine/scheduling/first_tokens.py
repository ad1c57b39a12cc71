"""First tokens that are owed: under `fair`, who need not wait for domains that ask for more than their share.

A domain is within its share while its unfinished sequences of a tier, waiting ones too, are no more than its part of
the rows: rows * weight / the weights of all domains there, one at least. Its waiting sequence is owed its first token
while a domain that asks for more than its share runs and has been served no less.

What is owed costs nobody his work, and no two domains pass a row back and forth: it only ever goes from a domain over
its share to one within it, and which of the two a domain is depends on nothing but how much it asks for. It is charged
like all service, so whoever sends more than others get is soon served more than they are, and owed nothing.

Who was rescued (engine/scheduling/rescue.py) has waited for thousands of steps, and waits for these, too: at most
ALONE_MAX in a row, and none of a tier below its own or another's that is here.
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Line

from engine.scheduling.order import Outlook, highest_response_ratio
from engine.scheduling.tiers import BATCH, RESCUED, TIERS
from engine.sequence import Sequence

OWED_RANKS = frozenset(TIERS.values()) - {BATCH}  # batch work takes what others leave, and is owed nothing

ALONE_MAX = 2  # steps in a row that compute nothing but owed first tokens; then everybody's turn comes
FAR_OVER = 2  # times its share: less may be chance


class RowShares:
    """How many sequences each domain has in each tier, against its part of ``num_rows``."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._num_asked: Counter[tuple[int, str]] = Counter()  # by tier and domain
        self._weights: dict[tuple[int, str], int] = {}  # of the sequence that came last
        self._weight_of_all: Counter[int] = Counter()  # by tier

    def add(self, sequence: Sequence) -> None:
        key = sequence.tier, sequence.domain
        self._num_asked[key] += 1
        self._weigh(key, max(1, sequence.weight))

    def remove(self, sequence: Sequence) -> None:
        key = sequence.tier, sequence.domain
        self._num_asked[key] -= 1
        if not self._num_asked[key]:
            del self._num_asked[key]
            self._weigh(key, 0)
            del self._weights[key]

    def with_one(self, sequence: Sequence) -> "RowShares":
        """What the shares would be with one sequence more."""
        shares = RowShares(self._num_rows)
        shares._num_asked, shares._weights = self._num_asked.copy(), self._weights.copy()
        shares._weight_of_all = self._weight_of_all.copy()
        shares.add(sequence)
        return shares

    def is_within(self, tier: int, domain: str) -> bool:
        return self._num_asked[tier, domain] <= self._share(tier, domain)

    def is_far_over(self, tier: int, domain: str) -> bool:
        return self._num_asked[tier, domain] > FAR_OVER * self._share(tier, domain)

    def _share(self, tier: int, domain: str) -> int:
        return max(1, self._num_rows * self._weights.get((tier, domain), 1) // max(1, self._weight_of_all[tier]))

    def _weigh(self, key: tuple[int, str], weight: int) -> None:
        self._weight_of_all[key[0]] += weight - self._weights.get(key, 0)
        self._weights[key] = weight


def most_served_over(tier: int, running: Iterable[Sequence], shares: RowShares, outlook: Outlook) -> str | None:
    """Of the domains over their share that run in the tier, the one that was served most."""
    domains = {sequence.domain for sequence in running if sequence.rank == tier}
    over = [domain for domain in domains if shares.is_far_over(tier, domain)]
    return max(over, key=lambda domain: (outlook.served.of(tier, domain), domain), default=None)


def next_owed(
    tier: int, waiting: Line[Sequence], waiting_domains: Iterable[str], over: str, shares: RowShares, outlook: Outlook
) -> Sequence | None:
    """Who is owed a first token now, before ``over``: of the domain that was served least."""
    of = outlook.served.of
    owed = [
        domain for domain in waiting_domains if of(tier, domain) <= of(tier, over) and shares.is_within(tier, domain)
    ]
    if not owed:
        return None
    domain = min(owed, key=lambda name: (of(tier, name), name))
    line = [sequence for sequence in waiting if sequence.rank == tier and sequence.domain == domain]
    return highest_response_ratio(line, outlook) if line else None


def would_be_owed(
    newcomer: Sequence,
    waiting: Line[Sequence],
    waiting_domains: Line[str],
    running: Iterable[Sequence],
    shares: RowShares,
    outlook: Outlook,
) -> bool:
    """Whether one that is not waiting yet would be next, once it is, and what was thrown away for its domain is made
    up for."""
    tier, domain, served = newcomer.tier, newcomer.domain, outlook.served
    shares = shares.with_one(newcomer)
    over = most_served_over(tier, running, shares, outlook)
    if over is None or not shares.is_within(tier, domain):
        return False
    if next_owed(tier, waiting, waiting_domains, over, shares, outlook) is not None:
        return False  # somebody who found no room
    return served.with_losses(tier, domain, waiting_domains) <= served.of(tier, over)


def rank_before_rescued(everybody: Line[Sequence]) -> int | None:
    """The tier whose owed first tokens come before a rescued one's prompt: the highest that is here, if one is."""
    if not any(sequence.rank == RESCUED for sequence in everybody):
        return None
    return max(sequence.tier for sequence in everybody)
