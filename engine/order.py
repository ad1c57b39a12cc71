"""Which waiting sequence is next: small, separate decisions. Each takes what it needs and returns a choice; none
keeps state."""

from collections.abc import Callable
from collections.abc import Sequence as Line

from engine.sequence import Sequence

# (waiting, in order of arrival and not empty; domain that was admitted last) -> the next one to admit
DomainOrder = Callable[[Line[Sequence], str], Sequence]


def fcfs(waiting: Line[Sequence], last_domain: str) -> Sequence:
    """First come, first served, whoever it is."""
    return waiting[0]


def round_robin(waiting: Line[Sequence], last_domain: str) -> Sequence:
    """One domain after another in the order of their names, first come first served within each."""
    heads: dict[str, Sequence] = {}
    for sequence in waiting:
        heads.setdefault(sequence.domain, sequence)
    following = [domain for domain in heads if domain > last_domain]
    return heads[min(following) if following else min(heads)]


DOMAIN_ORDERS: dict[str, DomainOrder] = {"fcfs": fcfs, "round_robin": round_robin}


def youngest(running: Line[Sequence]) -> Sequence:
    """Victim choice: the sequence that came last has the least to lose, and the oldest always gets on."""
    return max(running, key=lambda sequence: sequence.arrival)
