"""Floors and ceilings of the prefix cache, seen from the engine: what stays, what goes, and that everybody gets on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cache.cache_shares import CacheShares
from engine.core import EngineCore
from engine.protocol import TokenOutput
from gateway.audit_observer import AuditObserver
from tests.engine.test_core_properties import Load, loads
from tests.strategies.integer_model import continuation, integer_core, submit

CONTEXT_MAX = 32  # the longest prompt and answer of a load
PROMPT = list(range(1, 10))  # four full blocks of two, and one token


def run(core: EngineCore, name: str, prompt: list[int], max_tokens: int = 3, *, domain: str = "a") -> TokenOutput:
    """One sequence to its end; its last output."""
    assert core.add(submit(name, prompt, max_tokens, domain=domain)) is None
    outputs = []
    while core.has_work:
        outputs += core.step().outputs
    return outputs[-1]


def flood(core: EngineCore, num_requests: int) -> None:
    for index in range(num_requests):
        prompt = [10 + index % 50, 10 + index // 50, *range(20)]
        run(core, f"flood {index}", prompt, 2, domain="b")


@pytest.mark.parametrize(("floor_percent", "num_cached"), [(0, 0), (50, 8)])
def test_a_flood_evicts_nothing_below_the_floor(floor_percent: int, num_cached: int) -> None:
    core, _ = integer_core(num_blocks=32, context_max=CONTEXT_MAX, cache_floor_percent=floor_percent)
    run(core, "first", PROMPT)
    flood(core, 12)
    assert run(core, "again", PROMPT).num_cached_tokens == num_cached


def test_what_lies_above_the_floor_is_evicted() -> None:
    core, _ = integer_core(num_blocks=40, context_max=CONTEXT_MAX, cache_floor_percent=15)
    for index in range(4):
        run(core, f"a{index}", [index + 1, *PROMPT])
    flood(core, 12)
    assert core.pool.num_cached_by_domain["a"] == 40 * 15 // 100 // 2


def test_a_lone_tenant_fills_the_cache_unless_there_is_a_ceiling() -> None:
    for ceiling_percent, most in ((100, 40), (25, 10)):
        core, _ = integer_core(num_blocks=40, cache_ceiling_percent=ceiling_percent)
        for index in range(12):
            run(core, f"a{index}", [index + 1, *PROMPT])
        assert core.pool.num_cached_by_domain == {"a": most}


def test_a_ceiling_costs_nobody_else_anything() -> None:
    core, _ = integer_core(num_blocks=64, cache_ceiling_percent=20)
    run(core, "first", PROMPT)
    for index in range(4):
        run(core, f"b{index}", [index + 1, *PROMPT], domain="b")
    assert core.pool.num_cached_by_domain == {"a": 5, "b": 12}


def test_what_a_ceiling_costs_is_the_longest_unread() -> None:
    core, _ = integer_core(num_blocks=40, cache_ceiling_percent=25)
    run(core, "old", [1, *PROMPT])
    run(core, "new", [2, *PROMPT])
    run(core, "newer", [3, *PROMPT])
    assert run(core, "old again", [1, *PROMPT], 1).num_cached_tokens == 0
    assert run(core, "newer again", [3, *PROMPT], 1).num_cached_tokens == 8


@given(loads(), st.sampled_from([10, 50]), st.sampled_from([5, 40, 100]))
def test_everybody_ends_whatever_others_have_cached(load: Load, floor_percent: int, ceiling_percent: int) -> None:
    num_blocks = -(-CONTEXT_MAX // load.block_size) + load.num_blocks
    observer = AuditObserver(num_blocks, load.block_size)
    core, _ = integer_core(
        num_blocks=num_blocks,
        block_size=load.block_size,
        max_batched_tokens=load.max_batched_tokens,
        max_num_seqs=load.max_num_seqs,
        scheduling=load.scheduling,
        wait_max_tokens=load.wait_max_tokens,
        context_max=CONTEXT_MAX,
        cache_floor_percent=floor_percent,
        cache_ceiling_percent=ceiling_percent,
        observer=observer,
    )
    tokens: dict[str, list[int]] = {}
    for index, arrival in enumerate(load.arrivals):
        for round_number in range(2):
            name = f"s{index}.{round_number}"
            tokens[name] = []
            prompt = arrival.prompt
            assert core.add(submit(name, prompt, arrival.max_tokens, domain=arrival.domain, tier=arrival.tier)) is None
        for _ in range(arrival.step % 3):
            for output in core.step().outputs:
                tokens[output.sequence_id] += output.token_ids
    for _ in range(3000):
        if not core.has_work:
            break
        for output in core.step().outputs:
            tokens[output.sequence_id] += output.token_ids
    for name, got in tokens.items():
        arrival = load.arrivals[int(name[1:].split(".")[0])]
        assert got == continuation(arrival.prompt, arrival.max_tokens), name
    assert core.pool.num_free == num_blocks
    assert observer.counters()["num_violations"] == 0


@given(
    st.integers(0, 400),
    st.integers(1, 40),
    st.builds(CacheShares, st.integers(0, 50), st.integers(1, 100), st.integers(0, 400)),
)
def test_a_reservation_never_takes_what_the_context_needs(
    num_usable: int, num_domains: int, shares: CacheShares
) -> None:
    reserved = shares.num_reserved(num_usable)
    assert 0 <= shares.floor(num_usable, num_domains) * num_domains <= reserved <= num_usable // 2
    assert num_usable - reserved >= min(num_usable, shares.num_blocks_kept_free)


def test_shares_have_limits() -> None:
    for floor_percent, ceiling_percent in ((51, 100), (-1, 100), (0, 0), (0, 101)):
        with pytest.raises(ValueError, match="percent must be between"):
            CacheShares(floor_percent, ceiling_percent)
