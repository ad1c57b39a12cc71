"""The probes' tests against brute force over all signs and all orders, against tables, and by simulation."""

import random
from fractions import Fraction
from itertools import combinations, product
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.probes.probe_statistics import (
    NUM_PAIRS_MAX,
    equivalence_p,
    holm,
    kolmogorov_smirnov_p,
    rate_bound,
    signed_rank_p,
)

small = st.integers(-6, 6)


@given(st.lists(small, max_size=9))
def test_signed_ranks_are_exact(differences: list[int]) -> None:
    """p is the share of all choices of signs that are at least as far up, ranks as everybody defines them."""
    kept = [difference for difference in differences if difference]
    ranks = [
        sum(Fraction(abs(other) < abs(own)) for other in kept)
        + (1 + sum(Fraction(abs(other) == abs(own)) for other in kept)) / 2
        for own in kept
    ]
    seen = sum(rank for rank, difference in zip(ranks, kept, strict=True) if difference > 0)
    sums = [sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in product((0, 1), repeat=len(kept))]
    assert signed_rank_p(differences) == pytest.approx(sum(total >= seen for total in sums) / len(sums))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=5), st.lists(st.integers(0, 8), min_size=1, max_size=5))
def test_kolmogorov_smirnov_is_exact_or_above(first: list[int], second: list[int]) -> None:
    def gap(ours: tuple[float, ...], theirs: tuple[float, ...]) -> Fraction:
        points = (*ours, *theirs)
        return max(
            abs(Fraction(sum(x <= at for x in ours), len(ours)) - Fraction(sum(x <= at for x in theirs), len(theirs)))
            for at in points
        )

    pool = first + second
    seen = gap(tuple(first), tuple(second))
    orders = list(combinations(range(len(pool)), len(first)))
    exact = sum(
        gap(tuple(pool[i] for i in chosen), tuple(pool[i] for i in range(len(pool)) if i not in chosen)) >= seen
        for chosen in orders
    ) / comb(len(pool), len(first))
    found = kolmogorov_smirnov_p(first, second)
    if len(set(pool)) == len(pool):
        assert found == pytest.approx(exact)
    else:
        assert found >= exact - 1e-12


def test_values_of_tables() -> None:
    # Wilcoxon's table: W = 8 of n = 10 negative ranks is p = 0.0244 one-sided; n = 5, all positive: 1 / 32.
    assert signed_rank_p([1, 2, 3, 4, 5]) == 1 / 32
    assert signed_rank_p([-1, -2, -5, 3, 4, 6, 7, 8, 9, 10]) == pytest.approx(0.0244, abs=1e-4)
    # Kolmogorov-Smirnov, n = m = 4, the samples apart: 2 of 70 orders.
    assert kolmogorov_smirnov_p([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert rate_bound(100) == pytest.approx(0.0295, abs=1e-3)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_never_helps(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(new >= old for new, old in zip(adjusted, p_values, strict=True))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [new for _, new in pairs] == sorted(adjusted)


@settings(max_examples=10)
@given(st.integers(0, 10_000))
def test_false_alarms_are_as_rare_as_promised(seed: int) -> None:
    """600 experiments without an effect at 5 %: 30 expected, 60 would be 5.6 standard deviations."""
    draw = random.Random(seed)
    alarms = {"ranks": 0, "ks": 0, "absence": 0}
    for _ in range(600):
        ours, theirs = ([draw.lognormvariate(3, 0.4) for _ in range(12)] for _ in range(2))
        alarms["ranks"] += signed_rank_p([a - b for a, b in zip(ours, theirs, strict=True)]) < 0.05
        alarms["ks"] += kolmogorov_smirnov_p(ours, theirs) < 0.05
        moved = [5.0 + draw.gauss(0, 3) for _ in range(12)]  # a difference of just the margin
        alarms["absence"] += equivalence_p(moved, 5.0) < 0.05
    assert all(count < 60 for count in alarms.values()), alarms


def test_an_effect_is_found_and_absence_shown() -> None:
    draw = random.Random(7)
    faster = [40 + draw.gauss(0, 10) for _ in range(12)]
    same = [draw.gauss(0, 3) for _ in range(12)]
    assert signed_rank_p(faster) < 0.001
    assert equivalence_p(faster, 10) > 0.9
    assert equivalence_p(same, 10) < 0.01
    assert signed_rank_p(same) > 0.05


def test_many_pairs_have_a_bound() -> None:
    assert signed_rank_p([1.0 + i / 1000 for i in range(NUM_PAIRS_MAX)]) < 1e-30
    with pytest.raises(ValueError, match="at most"):
        signed_rank_p([1.0] * (NUM_PAIRS_MAX + 1))


def test_long_samples_stay_within_floats() -> None:
    assert 0 <= kolmogorov_smirnov_p(list(range(700)), [i + 0.5 for i in range(700)]) <= 1
