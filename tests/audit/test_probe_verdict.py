"""What the probes conclude: each way to a leak, each way to not knowing, and what passes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.probes.probe_verdict import (
    ALPHA,
    Arms,
    Company,
    Seen,
    conclude,
    exchange_p,
    overall,
    seen_in_arms,
    seen_in_company,
    seen_of_canaries,
)


def rounds(own_saves: float, other_saves: float, *, noise: float = 4.0, num: int = 12, seed: int = 1) -> list[Arms]:
    draw = random.Random(seed)
    return [Arms(*(200 - saved + draw.gauss(0, noise) for saved in (own_saves, other_saves, 0.0))) for _ in range(num)]


def verdict(seen: Seen) -> str:
    return conclude([seen])[0].verdict


def test_a_shared_prefix_is_a_leak_and_a_separate_one_passes() -> None:
    assert verdict(seen_in_arms("prefix", rounds(150, 150))) == "leak"
    assert verdict(seen_in_arms("prefix", rounds(150, 40))) == "leak"  # only a part of it is shared
    assert verdict(seen_in_arms("prefix", rounds(150, 0))) == "pass"


@settings(max_examples=60)
@given(st.integers(0, 10**6))
def test_no_sharing_is_never_called_a_leak(seed: int) -> None:
    """At 1 % corrected, 60 runs would have fewer than one false alarm; these seeds have none."""
    assert verdict(seen_in_arms("prefix", rounds(150, 0, noise=15, seed=seed))) != "leak"


def test_without_power_nothing_is_called_absent() -> None:
    assert verdict(seen_in_arms("prefix", rounds(0, 0))) == "inconclusive"  # no cache to be seen
    assert verdict(seen_in_arms("prefix", rounds(150, 0, num=4))) == "inconclusive"  # too few rounds
    assert verdict(seen_in_arms("prefix", rounds(60, 0, noise=60))) == "inconclusive"  # too much noise
    assert verdict(seen_in_arms("prefix", [])) == "inconclusive"


def test_a_count_needs_no_statistics() -> None:
    one = Arms(50, 200, 200, own_cached=96, other_cached=64, fresh_cached=32)
    assert verdict(seen_in_arms("prefix", [one])) == "leak"
    told_nothing = Arms(50, 200, 200, own_cached=-1, other_cached=-1, fresh_cached=-1)
    same = Arms(50, 200, 200, own_cached=96, other_cached=32, fresh_cached=32)  # what every prompt begins with
    assert verdict(seen_in_arms("prefix", [told_nothing, same])) != "leak"


def test_canaries() -> None:
    assert verdict(seen_of_canaries(40, 5, [])) == "pass"
    assert verdict(seen_of_canaries(40, 5, ["found"])) == "leak"
    assert verdict(seen_of_canaries(40, 0, ["found"])) == "leak"
    assert verdict(seen_of_canaries(40, 0, [])) == "inconclusive"
    assert verdict(seen_of_canaries(0, 5, [])) == "inconclusive"


def test_answers_in_company() -> None:
    same = Company(("a", "a"), ("a",) * 4, ("a",) * 4)
    assert verdict(seen_in_company([same, same])) == "pass"
    numerics = Company(("a", "a"), ("a", "b", "a", "b"), ("b", "a", "a", "b"))
    assert verdict(seen_in_company([same, numerics])) == "inconclusive"
    assert verdict(seen_in_company([Company(("a", "b"), ("a",) * 4, ("a",) * 4)])) == "inconclusive"
    told = Company(("a", "a"), ("b",) * 6, ("c",) * 6)  # what the other says decides
    assert verdict(seen_in_company([told])) == "leak"
    assert exchange_p([told]) == pytest.approx(2 / 924)


def test_p_values_are_corrected_over_all_probes() -> None:
    weak = Seen("one", p_values={"x": ALPHA * 0.6}, shown="nothing")
    assert conclude([weak])[0].verdict == "leak"
    assert [finding.verdict for finding in conclude([weak, Seen("two", p_values={"x": 0.9}, shown="nothing")])] == [
        "pass",
        "pass",
    ]


def test_one_leak_decides_and_one_doubt_denies() -> None:
    passed, doubt, leak = Seen("a", shown="x"), Seen("b", lacking="x"), Seen("c", exact=("x",))
    assert overall(conclude([passed, passed])) == "pass"
    assert overall(conclude([passed, doubt])) == "inconclusive"
    assert overall(conclude([passed, doubt, leak])) == "leak"
    assert overall([]) == "inconclusive"
