"""The engine's time is shared out to the nanosecond, and idleness is nobody's."""

from dataclasses import dataclass
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from tenancy.usage.attribution import Span, attribute, block_ns, cost_nano_usd
from tenancy.usage.engine_time import EngineTime

instants = st.integers(0, 40)
spans = st.lists(
    st.builds(
        lambda tenant, start, length: Span(tenant, start, start + length, 5, 2, 3, 7),
        st.sampled_from("abc"),
        instants,
        st.integers(0, 20),
    ),
    max_size=8,
)


@given(spans=spans, since=instants, length=st.integers(1, 40))
def test_shares_and_idle_time_are_the_period(spans: list[Span], since: int, length: int) -> None:
    """Against each nanosecond by itself."""
    until = since + length
    exact: dict[str, Fraction] = {}
    idle = 0
    for at in range(since, until):
        here = [span.tenant_id for span in spans if span.started_ns <= at < span.finished_ns]
        idle += not here
        for tenant_id in here:
            exact[tenant_id] = exact.get(tenant_id, Fraction()) + Fraction(1, len(here))
    found = attribute(spans, since, until, block_size=4)
    assert (found.idle_ns, found.own_ns, found.other_ns) == (idle, 0, 0)
    assert sum(share.engine_ns for share in found.shares.values()) + idle == length
    for tenant_id, share in found.shares.items():
        assert abs(share.engine_ns - exact.get(tenant_id, 0)) <= 2 * len(spans) + 2  # less than one for each change
        ended = [span for span in spans if span.tenant_id == tenant_id and since <= span.finished_ns < until]
        assert (share.num_requests, share.num_prefill_tokens) == (len(ended), 3 * len(ended))
        assert (share.num_estimated, share.estimated_ns) == (len(ended), share.engine_ns)


@dataclass(frozen=True)
class Step:
    """One of an engine: who was in it with how many nanoseconds; nobody: its own."""

    pause: int
    parts: dict[int, int]  # by request
    own: int


steps = st.lists(
    st.builds(Step, st.integers(0, 5), st.dictionaries(st.integers(0, 5), st.integers(0, 9)), st.integers(0, 4)),
    max_size=12,
)


@given(
    timeline=steps,
    before=st.integers(0, 12),
    length=st.integers(0, 12),
    old=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=3),
)
def test_measured_time_own_time_and_idle_time_are_the_period(
    timeline: list[Step], before: int, length: int, old: list[tuple[int, int]]
) -> None:
    """A period of whole steps, after some others; requests of a time before anything was measured, after all."""
    now, begun, ended, taken = 0, {}, {}, dict.fromkeys(range(6), 0)
    notes = [(0, 0, 0)]  # after each step: when, all steps, own
    for step in timeline:
        now += step.pause
        for request, part in step.parts.items():
            begun.setdefault(request, now)
            taken[request] += part
        now += sum(step.parts.values()) + step.own
        ended |= dict.fromkeys(step.parts, now - 1)
        notes.append((now, notes[-1][1] + sum(step.parts.values()) + step.own, notes[-1][2] + step.own))
    first, last = (notes[min(place, len(notes) - 1)] for place in (before, before + length))
    since, until = first[0], max(last[0], first[0] + 1)
    spans = [
        Span(
            "abc"[request % 3],
            begun[request],
            max(begun[request], ended[request]),
            5,
            2,
            3,
            7,
            taken[request],
            1,
            2,
            3,
            4,
        )
        for request in begun
    ]
    at = now + 1
    unmeasured = []
    for pause, life in old:
        unmeasured.append(Span("d", at + pause, at + pause + life, 5, 2, 3, 7))
        at += pause + life
    engines = EngineTime(last[1] - first[1], last[2] - first[2])
    found = attribute(spans + unmeasured, since, until, block_size=4, engines=engines)
    shares = sum(share.engine_ns for share in found.shares.values())
    assert shares + found.own_ns + found.idle_ns + found.other_ns == until - since
    assert found.idle_ns == max(0, until - since - (engines.step_ns or shares))
    inside = [span for span in spans if since <= span.finished_ns < until]
    assert shares == sum(span.engine_ns or 0 for span in inside)
    if before == 0 and length >= len(timeline) and now:  # all there ever was: nothing is left over
        assert (found.other_ns, found.own_ns) == (0, notes[-1][2])
        assert found.idle_ns == sum(step.pause for step in timeline)
    whole = attribute(spans + unmeasured, 0, at + 1, block_size=4, engines=EngineTime(notes[-1][1], notes[-1][2]))
    lives = sum(life for _, life in old)
    assert whole.other_ns == 0
    assert whole.idle_ns == at + 1 - notes[-1][1] - lives
    assert sum(share.num_estimated for share in whole.shares.values()) == len(old)
    assert sum(share.estimated_ns for share in whole.shares.values()) == lives
    assert sum(share.num_prefill_tokens for share in whole.shares.values()) == 2 * len(spans) + 3 * len(old)


def test_two_engines_have_twice_the_time() -> None:
    span = Span("a", 0, 9, 5, 0, 3, 7, 6, 40, 5, 1, 2)
    found = attribute([span], 0, 10, block_size=4, engines=EngineTime(9, 1, 2))
    assert (found.own_ns, found.idle_ns, found.other_ns) == (1, 11, 2)  # 2 ns are on no row
    share = found.shares["a"]
    assert (share.engine_ns, share.cache_block_ns, share.num_recomputed_tokens, share.num_estimated) == (6, 40, 1, 0)


@given(prompt=st.integers(0, 70), completion=st.integers(0, 70), length=st.integers(0, 10**12), size=st.integers(1, 40))
def test_block_seconds_against_each_token_by_itself(prompt: int, completion: int, length: int, size: int) -> None:
    parts = max(1, completion)
    exact = sum(Fraction(-(-(prompt + n) // size) * length, parts) for n in range(parts))
    assert block_ns(Span("a", 7, 7 + length, prompt, 0, completion, 0), size) == exact.numerator // exact.denominator
    tokens = sum(Fraction((prompt + n) * length, parts) for n in range(parts))
    assert 0 <= exact * size - tokens < size * length + 1  # at most one block is not full


def test_by_hand() -> None:
    second = 10**9
    one = Span("a", 0, 6 * second, 100, 40, 20, 9)
    two = Span("b", 4 * second, 8 * second, 10, 0, 2, 5)
    found = attribute([one, two], 0, 10 * second, block_size=32)
    assert found.idle_ns == 2 * second
    a, b = found.shares["a"], found.shares["b"]
    assert (a.engine_ns, b.engine_ns) == (5 * second, 3 * second)
    assert (a.num_prefill_tokens, a.num_decode_steps, a.cache_token_seconds, a.revenue_nano_usd) == (60, 20, 660, 9)
    assert a.cache_block_ns == 4 * 6 * second  # 100 to 119 tokens are four blocks of 32
    assert b.cache_block_ns == 1 * 4 * second
    assert cost_nano_usd(1_800 * second, 3 * second) == 1_500_000_000
