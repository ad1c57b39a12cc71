"""Sampling is a function of a row's logits, its parameters, its own tokens, its seed and its position, and it is the
function that tests/strategies/reference_sampler.py says."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.protocol import BIAS_MAX, LOGPROBS_MAX, SamplingParams
from engine.sampling.adjustments import adjusted
from engine.sampling.row import Row
from engine.sampling.sampler import NOT_FINITE, Leaders, Pick, pick, uniform
from engine.sampling.truncation import largest, truncated
from kernels.cpu.backend import NativeBackend
from tests.kernels.native import every_isa
from tests.strategies import reference_sampler as reference

SEEDS = st.integers(-(2**63), 2**63 - 1)
POSITIONS = st.integers(0, 10**6)
VOCAB_SIZE = 24
ENDS = {3, 5}
LOGITS = st.lists(
    st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0]) | st.floats(-8, 8, width=32), min_size=VOCAB_SIZE, max_size=VOCAB_SIZE
)
TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=30)
PENALTIES = st.sampled_from([0.0, -2.0, 2.0]) | st.floats(-2, 2)
BIASES = st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-BIAS_MAX, BIAS_MAX), max_size=5)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        max_tokens=100,
        temperature=draw(st.sampled_from([0.0, 1.0]) | st.floats(0.05, 3)),
        top_p=draw(st.just(1.0) | st.floats(0.01, 1)),
        seed=draw(SEEDS),
        top_k=draw(st.just(0) | st.integers(0, VOCAB_SIZE + 3)),
        min_p=draw(st.just(0.0) | st.floats(0, 1)),
        repetition_penalty=draw(st.just(1.0) | st.floats(0.1, 3)),
        presence_penalty=draw(PENALTIES),
        frequency_penalty=draw(PENALTIES),
        logit_bias=tuple(draw(BIASES).items()),
        stop_token_ids=tuple(draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3))),
        min_tokens=draw(st.integers(0, 5)),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.integers(-1, LOGPROBS_MAX)),
    )


def float32(logits: list[float]) -> NDArray[np.float32]:
    return np.array(logits, dtype=np.float32)


def logits_of(seed: int, size: int = 2000) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


def draw(logits: NDArray[np.float32], position: int = 0, **how: Any) -> int:
    return pick(logits, Row(SamplingParams(max_tokens=1, **how), [0], 1), position).token_id


# --- against the specification ----------------------------------------------------------------------------------------


@given(LOGITS, params(), TOKENS.filter(len), TOKENS, POSITIONS)
def test_it_is_the_function_that_the_specification_says(
    logits: list[float], sampling: SamplingParams, prompt: list[int], output: list[int], position: int
) -> None:
    picked = pick(float32(logits), Row(sampling, prompt + output, len(prompt), ENDS), position)
    values = reference.adjusted([float(v) for v in float32(logits)], sampling, prompt, output, ENDS)
    if max(values) == -math.inf:
        assert picked == Pick(NOT_FINITE)
        return
    if sampling.temperature == 0:
        temperature, allowed = 1.0, reference.kept(values, 1.0, top_k=0, top_p=1.0, min_p=0.0)
        assert picked.token_id == reference.in_order(values)[0]
    else:
        temperature = sampling.temperature
        how = {"top_k": sampling.top_k, "min_p": sampling.min_p}
        least = reference.kept(values, temperature, top_p=sampling.top_p * (1 - 1e-12), **how)
        allowed = reference.kept(values, temperature, top_p=min(1.0, sampling.top_p * (1 + 1e-12)), **how)
        if least != allowed:
            return  # a border within rounding: either is right
    assert picked.token_id in allowed
    if sampling.logprobs < 0:
        assert picked.logprob is None
        return
    assert picked.logprob is not None
    expected = reference.logprobs(values, temperature, allowed)
    told = dict(picked.logprob.top)
    assert list(told) == allowed[: sampling.logprobs]
    for token_id, logprob in [(picked.token_id, picked.logprob.logprob), *told.items()]:
        assert logprob == pytest.approx(expected[token_id], rel=1e-9, abs=1e-9)
        assert logprob <= 0
    if len(allowed) <= sampling.logprobs:
        assert math.fsum(math.exp(logprob) for logprob in told.values()) == pytest.approx(1)


@every_isa
@given(
    st.integers(0, 2**20),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 40, 1500, 6000]),
    st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    st.sampled_from([0.0, 0.01]),
    st.sampled_from([-1, 0, 5]),
)
def test_what_the_kernels_find_changes_no_bit(
    isa: str, seed: int, temperature: float, top_k: int, top_p: float, min_p: float, num_top: int
) -> None:
    logits = logits_of(seed, 5003)
    logits[::7] = logits[0]  # ties
    top, rows = NativeBackend(isa).top, torch.from_numpy(logits)[None]

    def ranked(count: int) -> NDArray[np.int64]:
        return top(rows, min(count, len(logits)))[0][0].numpy() if count else np.empty(0, dtype=np.int64)

    found = Leaders(int(top(rows, 1)[0]), ranked)
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "logprobs": num_top}
    for temperate in (how, how | {"temperature": 0.0}):
        row = Row(SamplingParams(max_tokens=1, seed=seed, **temperate), [0], 1)  # type: ignore[arg-type]
        assert pick(logits, row, 1, found) == pick(logits, row, 1)


@given(LOGITS, params(), TOKENS.filter(len), TOKENS)
def test_adjustments_are_exactly_the_specified_ones(
    logits: list[float], sampling: SamplingParams, prompt: list[int], output: list[int]
) -> None:
    expected = reference.adjusted([float(v) for v in float32(logits)], sampling, prompt, output, ENDS)
    found = adjusted(float32(logits), Row(sampling, prompt + output, len(prompt), ENDS))
    assert (found is None) == (max(expected) == -math.inf)
    assert found is None or found.tolist() == expected


@given(LOGITS, st.integers(0, 30), st.just(1.0) | st.floats(0.01, 1), st.just(0.0) | st.floats(0, 1))
def test_the_kept_set_is_exact(logits: list[float], top_k: int, top_p: float, min_p: float) -> None:
    values = [float(v) for v in float32(logits)]
    weights = np.array(reference.weights_of(values, 1.0))
    found = truncated(np.array(values), weights, top_k=top_k, top_p=top_p, min_p=min_p)
    ids = list(range(VOCAB_SIZE)) if found.ids is None else found.ids.tolist()
    tighter = reference.kept(values, 1.0, top_k=top_k, top_p=top_p * (1 - 1e-12), min_p=min_p)
    looser = reference.kept(values, 1.0, top_k=top_k, top_p=min(1.0, top_p * (1 + 1e-12)), min_p=min_p)
    assert set(tighter) <= set(ids) <= set(looser)
    assert len(found.cumulative) == len(ids) == len(set(ids))


@given(LOGITS, params(), TOKENS.filter(len), TOKENS, st.integers(0, VOCAB_SIZE - 1), st.floats(0, 50))
def test_a_bias_only_helps_its_token(
    logits: list[float], sampling: SamplingParams, prompt: list[int], output: list[int], token_id: int, more: float
) -> None:
    def probability(bias: float) -> float:
        how = {"logit_bias": ((token_id, bias),), "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        how |= {"logprobs": LOGPROBS_MAX, "min_tokens": 0}
        fields = {name: getattr(sampling, name) for name in sampling.__struct_fields__} | how
        row = Row(SamplingParams(**fields), prompt + output, len(prompt), ENDS)
        values = adjusted(float32(logits), row)
        assert values is not None
        return float(np.exp(values[token_id] - values.max()) / np.exp(values - values.max()).sum())

    assert probability(more) >= probability(0.0) >= probability(-more)


# --- numbers ----------------------------------------------------------------------------------------------------------


@given(st.permutations(range(6)), st.floats(0.1, 3), st.floats(0.05, 1), POSITIONS)
def test_the_order_of_rows_does_not_matter(order: list[int], temperature: float, top_p: float, position: int) -> None:
    def of(row: int) -> int:
        return draw(logits_of(row), position + row, temperature=temperature, top_p=top_p, seed=row)

    one_way = {row: of(row) for row in range(6)}
    assert {row: of(row) for row in order} == one_way


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


GOLDEN = [
    ({"temperature": 3.0}, [478, 237, 671, 1171]),
    ({"temperature": 3.0, "top_p": 0.9}, [1880, 1705, 1990, 728]),
    ({"temperature": 3.0, "top_k": 40}, [1947, 1408, 1564, 1649]),
    ({"temperature": 3.0, "min_p": 0.05}, [527, 293, 728, 1223]),
]


@pytest.mark.parametrize(("how", "tokens"), GOLDEN)
def test_golden_tokens(how: dict[str, float], tokens: list[int]) -> None:
    assert [draw(logits_of(1), position, seed=9, **how) for position in range(4)] == tokens


@given(st.integers(0, 50), SEEDS, POSITIONS, st.sampled_from([0.0, 1e-300, 9e-6]))
def test_temperature_zero_is_greedy(row: int, seed: int, position: int, temperature: float) -> None:
    logits = logits_of(row)
    assert draw(logits, position, temperature=temperature, top_p=0.5, seed=seed) == int(logits.argmax())


@pytest.mark.parametrize("how", [{}, {"top_p": 0.999999}, {"top_k": 4}, {"min_p": 1e-9}])
def test_frequencies_follow_the_weights(how: dict[str, float]) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    drawn = [draw(logits, position, seed=11, **how) for position in range(4000)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)


@given(st.integers(0, 20), st.integers(0, 2100))
def test_a_part_is_sorted_as_the_whole_is(row: int, count: int) -> None:
    logits = logits_of(row)
    logits[::7] = logits[0]  # ties
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    np.testing.assert_array_equal(largest(logits, count), order[:count])


@given(st.integers(0, 20), st.floats(0.9, 0.99999))
def test_a_part_of_the_nucleus_is_enough(row: int, top_p: float) -> None:
    """Longer than TOP_P_FIRST_TOKENS, so that both ways are taken."""
    logits = logits_of(row)
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    found = truncated(logits, weights, top_k=0, top_p=top_p, min_p=0.0)
    assert found.ids is not None
    order = np.argsort(-logits, kind="stable")[: len(found.ids)]
    np.testing.assert_array_equal(found.ids, order)
    assert found.cumulative[-1] >= top_p * weights.sum() * (1 - 1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_told_apart(bad: float, temperature: float) -> None:
    logits = logits_of(1)
    logits[17] = bad
    assert draw(logits, temperature=temperature) == NOT_FINITE


# --- rows -------------------------------------------------------------------------------------------------------------


@given(LOGITS, params(), TOKENS.filter(len), TOKENS, st.data())
def test_a_row_built_again_is_the_row_that_was_there_all_along(
    logits: list[float], sampling: SamplingParams, prompt: list[int], output: list[int], data: st.DataObject
) -> None:
    """As after a preemption: what a row has counted is a function of its sequence's tokens, however often it looked."""
    tokens = list(prompt)
    row = Row(sampling, tokens, len(prompt), ENDS)
    for token_id in output:
        if data.draw(st.booleans()):
            pick(float32(logits), row, len(tokens))
        tokens.append(token_id)
    again = Row(sampling, list(tokens), len(prompt), ENDS)
    assert pick(float32(logits), row, len(tokens)) == pick(float32(logits), again, len(tokens))


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"logit_bias": ((1, 101.0),)},
        {"logit_bias": ((1, math.nan),)},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"min_tokens": -1},
        {"logprobs": 21},
        {"logprobs": -2},
    ],
)
def test_parameters_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SamplingParams(max_tokens=1, **change)
