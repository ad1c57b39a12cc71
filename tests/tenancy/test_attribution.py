"""The engine's time is shared out to the nanosecond, and idleness is nobody's."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from tenancy.usage.attribution import Span, attribute, block_ns, cost_nano_usd

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
    assert found.idle_ns == idle
    assert sum(share.engine_ns for share in found.shares.values()) + idle == length
    for tenant_id, share in found.shares.items():
        assert abs(share.engine_ns - exact.get(tenant_id, 0)) <= 2 * len(spans) + 2  # less than one for each change
        ended = [span for span in spans if span.tenant_id == tenant_id and since <= span.finished_ns < until]
        assert (share.num_requests, share.num_prefill_tokens) == (len(ended), 3 * len(ended))


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
