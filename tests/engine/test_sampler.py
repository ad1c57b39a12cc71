"""Sampling is a function of a row's logits, its parameters, its seed and its position."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import sampler
from engine.sampler import NOT_FINITE, sample, uniform

SEEDS = st.integers(-(2**70), 2**70)
POSITIONS = st.integers(0, 10**6)


def logits_of(seed: int, size: int = 2000) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


@given(st.permutations(range(6)), st.floats(0.1, 3), st.floats(0.05, 1), POSITIONS)
def test_the_order_of_rows_does_not_matter(order: list[int], temperature: float, top_p: float, position: int) -> None:
    def draw(row: int) -> int:
        return sample(logits_of(row), temperature=temperature, top_p=top_p, seed=row, position=position + row)

    one_way = {row: draw(row) for row in range(6)}
    assert {row: draw(row) for row in order} == one_way


@given(SEEDS, POSITIONS)
def test_numbers_are_keyed(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0
    assert uniform(seed, position) == uniform(seed, position)
    assert uniform(seed, position) != uniform(seed, position + 1)
    assert uniform(seed, position) != uniform(seed + 1, position)


def test_golden_numbers() -> None:
    """A seed promises the same answer after an upgrade, too."""
    assert [round(uniform(seed, position), 12) for seed, position in [(0, 0), (0, 1), (7, 100), (-1, 5)]] == [
        0.011546754286,
        0.813354060979,
        0.251681214314,
        0.055415658985,
    ]


@given(st.integers(0, 50), SEEDS, POSITIONS)
def test_temperature_zero_is_greedy(row: int, seed: int, position: int) -> None:
    logits = logits_of(row)
    assert sample(logits, temperature=0.0, top_p=0.5, seed=seed, position=position) == int(logits.argmax())


@given(st.integers(0, 50), st.floats(0.01, 1), st.floats(0.2, 2), st.integers(0, 1000))
def test_top_p_stays_within_the_smallest_set(row: int, top_p: float, temperature: float, position: int) -> None:
    logits = logits_of(row).astype(np.float64)
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-weights, kind="stable")
    before = (weights[order].cumsum() - weights[order]) / weights.sum()
    allowed = set(order[before < top_p + 1e-9].tolist())
    assert sample(logits_of(row), temperature=temperature, top_p=top_p, seed=3, position=position) in allowed


@pytest.mark.parametrize("top_p", [1.0, 0.999999])
def test_frequencies_follow_the_weights(top_p: float) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    drawn = [sample(logits, temperature=1.0, top_p=top_p, seed=11, position=position) for position in range(4000)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)


@given(st.integers(0, 20), st.floats(0.9, 0.99999))
def test_sorting_a_part_gives_what_sorting_all_gives(row: int, top_p: float) -> None:
    logits = logits_of(row)
    logits[::7] = logits[0]  # ties
    weights = np.exp(logits.astype(np.float64))
    part = sampler._nucleus(weights, top_p)
    order = np.argsort(-weights, kind="stable")[: len(part[0])]
    np.testing.assert_array_equal(part[0], order)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_told_apart(bad: float, temperature: float) -> None:
    logits = logits_of(1)
    logits[17] = bad
    assert sample(logits, temperature=temperature, top_p=1.0, seed=0, position=0) == NOT_FINITE
