"""Which waiting sequence is next, and who must make way: small, separate decisions. Each takes what it needs and
returns a choice; none keeps state."""

from collections.abc import Callable
from collections.abc import Sequence as Line

from engine.sequence import Sequence
from engine.served_tokens import ServedTokens

WAIT_MAX_TOKENS = 65_536  # tokens served to everybody while a sequence waits, before it is its domain's next

# (waiting, in order of arrival and not empty; who was served how much) -> the next one to admit
Policy = Callable[[Line[Sequence], ServedTokens], Sequence]


def fcfs(waiting: Line[Sequence], served: ServedTokens) -> Sequence:
    """First come, first served, whoever it is."""
    return waiting[0]


def round_robin(waiting: Line[Sequence], served: ServedTokens) -> Sequence:
    """One domain after another in the order of their names, first come first served within each."""
    heads: dict[str, Sequence] = {}
    for sequence in waiting:
        heads.setdefault(sequence.domain, sequence)
    following = [domain for domain in heads if domain > served.last_domain]
    return heads[min(following) if following else min(heads)]


def fair(waiting: Line[Sequence], served: ServedTokens) -> Sequence:
    """The domain that was served least, and of it whoever has the highest response ratio."""
    domain = min({sequence.domain for sequence in waiting}, key=lambda name: (served.of(name), name))
    return highest_response_ratio([sequence for sequence in waiting if sequence.domain == domain], served)


def highest_response_ratio(waiting: Line[Sequence], served: ServedTokens) -> Sequence:
    """Short prompts first, and long ones the sooner the longer they wait. After WAIT_MAX_TOKENS: strictly by arrival,
    so that no stream of short prompts keeps a long one out."""
    if served.total - waiting[0].served_at_arrival >= WAIT_MAX_TOKENS:
        return waiting[0]

    def rank(sequence: Sequence) -> tuple[float, int]:
        waited = served.total - sequence.served_at_arrival
        return (waited + sequence.num_prompt_tokens) / sequence.num_prompt_tokens, -sequence.arrival

    return max(waiting, key=rank)


POLICIES: dict[str, Policy] = {"fair": fair, "fcfs": fcfs, "round_robin": round_robin}


def youngest(running: Line[Sequence]) -> Sequence:
    """Victim choice: the sequence that came last has the least to lose, and the oldest always gets on."""
    return max(running, key=lambda sequence: sequence.arrival)


def decodes_first(running: Line[Sequence]) -> list[Sequence]:
    """Who has one token to compute goes before who has a prompt to read; otherwise by arrival. A long prompt is cut
    into what is left of a step instead of making everybody's answers wait."""
    return sorted(running, key=lambda s: (s.num_tokens - s.num_computed_tokens > 1, s.arrival))
