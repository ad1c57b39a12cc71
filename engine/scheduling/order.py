"""Which waiting sequence is next, and who must make way: small, separate decisions. Each takes what it needs and
returns a choice; none keeps state. Policies choose within one tier; between tiers engine/scheduling/scheduler.py goes
strictly by rank. Waits are counted in tokens served to everybody."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Line
from dataclasses import dataclass, field

from engine.scheduling.output_lengths import OutputLengths
from engine.scheduling.served_tokens import ServedTokens
from engine.sequence import Sequence

WAIT_MAX_TOKENS = 65_536  # default of the hard bound on waiting (engine/scheduling/rescue.py)
BOUND_TOKENS = 8_192  # of the policy `bounded`: how long shorter answers may go first
SKIPPED_MAX = 8  # times that a sequence without room is passed over; then nobody of its tier enters before it


@dataclass(slots=True)
class Outlook:
    """What policies may look at: who was served how much, and how long answers tend to be."""

    num_slots: int  # of the pool
    wait_max_tokens: int = WAIT_MAX_TOKENS
    served: ServedTokens = field(default_factory=ServedTokens)
    lengths: OutputLengths = field(default_factory=OutputLengths)

    def waited(self, sequence: Sequence) -> int:
        return self.served.total - sequence.served_at_arrival

    @property
    def bound_tokens(self) -> int:
        return min(BOUND_TOKENS, self.wait_max_tokens)


# (waiting sequences of one tier, in order of arrival and not empty; outlook) -> the next one to admit
Policy = Callable[[Line[Sequence], Outlook], Sequence]


def fcfs(waiting: Line[Sequence], outlook: Outlook) -> Sequence:
    """First come, first served, whoever it is."""
    return waiting[0]


def round_robin(waiting: Line[Sequence], outlook: Outlook) -> Sequence:
    """One domain after another in the order of their names, first come first served within each."""
    heads: dict[str, Sequence] = {}
    for sequence in waiting:
        heads.setdefault(sequence.domain, sequence)
    following = [domain for domain in heads if domain > outlook.served.last_domain]
    return heads[min(following) if following else min(heads)]


def sjf(waiting: Line[Sequence], outlook: Outlook) -> Sequence:
    """Whoever is expected to generate least. The mean wait is short, long answers wait for the hard bound."""
    return min(waiting, key=lambda s: (outlook.lengths.predict(s.domain, s.sampling.max_tokens), s.arrival))


def bounded(waiting: Line[Sequence], outlook: Outlook) -> Sequence:
    """Shortest expected answer first, until somebody has waited for `bound_tokens`: then whoever has waited longest,
    even if somebody else would fill the batch better (`may_be_skipped` says so too)."""
    first = waiting[0]
    return first if outlook.waited(first) >= outlook.bound_tokens else sjf(waiting, outlook)


def fair(waiting: Line[Sequence], outlook: Outlook) -> Sequence:
    """The domain that was served least, and of it whoever has the highest response ratio."""
    tier, of = waiting[0].tier, outlook.served.of
    domain = min({sequence.domain for sequence in waiting}, key=lambda name: (of(tier, name), name))
    return highest_response_ratio([sequence for sequence in waiting if sequence.domain == domain], outlook)


def highest_response_ratio(waiting: Line[Sequence], outlook: Outlook) -> Sequence:
    """Short prompts first, and long ones the sooner the longer they wait. After `wait_max_tokens`: strictly by arrival,
    so that no stream of short prompts keeps a long one out."""
    if outlook.waited(waiting[0]) >= outlook.wait_max_tokens:
        return waiting[0]
    total = outlook.served.total

    def rank(sequence: Sequence) -> tuple[float, int]:
        waited = total - sequence.served_at_arrival
        return (waited + sequence.num_prompt_tokens) / sequence.num_prompt_tokens, -sequence.arrival

    return max(waiting, key=rank)


POLICIES: dict[str, Policy] = {
    "fair": fair,
    "fcfs": fcfs,
    "round_robin": round_robin,
    "sjf": sjf,
    "bounded": bounded,
}


def may_be_skipped(sequence: Sequence, policy: Policy, outlook: Outlook) -> bool:
    """Whether others of its tier may still enter before a sequence that was next and found no room."""
    wait_tokens = outlook.bound_tokens if policy is bounded else outlook.wait_max_tokens
    return sequence.num_skipped < SKIPPED_MAX and outlook.waited(sequence) < wait_tokens


def may_pass(sequence: Sequence, head: Sequence, policy: Policy, outlook: Outlook) -> bool:
    """Whether this one may enter before ``head``, which is next and found no room. Under `fair` not where its domain is
    further ahead than all slots of the pool: small requests must not turn the gaps that large ones leave into more than
    their share."""
    if policy is not fair or sequence.domain == head.domain:
        return True
    return outlook.served.num_ahead(head.tier, sequence.domain, head.domain) <= outlook.num_slots


def first_to_go(sequences: Iterable[Sequence]) -> list[Sequence]:
    """Victim choice: the lowest rank first, and of it who came last: it has the least to lose, and the oldest of the
    highest rank always gets on."""
    return sorted(sequences, key=lambda sequence: (sequence.rank, -sequence.arrival))
