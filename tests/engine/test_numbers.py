"""What is fetched of a device's logits gives the same tokens and the same bits as whole rows, and is no more than a
row's sampling asks for."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.protocol import SamplingParams
from engine.sampling import numbers
from engine.sampling.numbers import fetched, numbers_of
from engine.sampling.row import Row
from engine.sampling.sampler import BROKEN, WHOLE, Pick, asks_for, leaders, pick
from engine.sampling.truncation import Few
from kernels.gpu.logits import TOP_K_MAX, top
from kernels.torch_cpu import top as plain_top
from tests.kernels.gpu.steps import DEVICE

VOCAB_SIZE = 96
PROMPT = [3, 4, 5]


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        max_tokens=4,
        temperature=draw(st.sampled_from([0.0, 0.7, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 3, TOP_K_MAX, TOP_K_MAX + 1, VOCAB_SIZE])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
        seed=draw(st.integers(0, 99)),
        logprobs=draw(st.sampled_from([-1, -1, 0, 5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        logit_bias=draw(st.sampled_from([(), (), ((7, 2.0),)])),
    )


def row_of(sampling: SamplingParams) -> Row:
    return Row(sampling, list(PROMPT), len(PROMPT))


def logits_of(kind: str, num_rows: int, seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    values = random.standard_normal((num_rows, VOCAB_SIZE), dtype=np.float32) * np.float32(3.0)
    if kind == "ties":
        values = np.round(values)
    elif kind == "equal":
        values[:] = -0.0
        values[:, ::2] = 0.0
    return torch.from_numpy(values)


def told(one: Pick) -> tuple[object, ...]:
    return (one.token_id, repr(one.logprob))


def asked(rows: list[Row]) -> list[int]:
    return [want if (want := asks_for(row, VOCAB_SIZE)) <= TOP_K_MAX else WHOLE for row in rows]


def picks(logits: Tensor, rows: list[Row]) -> list[tuple[object, ...]]:
    found = fetched(logits.to(DEVICE), asked(rows), top)
    return [told(pick(one.values, row, len(PROMPT), one.found)) for one, row in zip(found, rows, strict=True)]


@given(
    some=st.lists(samplings(), min_size=1, max_size=4),
    kind=st.sampled_from(["normal", "ties", "equal"]),
    seed=st.integers(0, 999),
)
def test_the_same_tokens_and_the_same_bits_as_from_whole_rows(some: list[SamplingParams], kind: str, seed: int) -> None:
    logits, rows = logits_of(kind, len(some), seed), [row_of(one) for one in some]
    whole = [told(pick(one, row, len(PROMPT), leaders(one))) for one, row in zip(logits.numpy(), rows, strict=True)]
    assert picks(logits, rows) == whole
    ours = numbers_of(logits.numpy(), plain_top)
    assert [told(pick(one.values, row, len(PROMPT), one.found)) for one, row in zip(ours, rows, strict=True)] == whole


@given(number=st.sampled_from([np.nan, np.inf, -np.inf]), place=st.integers(0, VOCAB_SIZE - 1), sampling=samplings())
def test_a_broken_row_breaks_alone_and_nothing_more_of_it_is_fetched(
    number: float, place: int, sampling: SamplingParams
) -> None:
    logits, rows = logits_of("normal", 3, place), [row_of(sampling)] * 3
    whole = picks(logits, rows)
    logits[1, place] = number
    found = fetched(logits.to(DEVICE), asked(rows), top)
    assert [told(pick(one.values, rows[0], len(PROMPT), one.found)) for one in found] == [
        whole[0],
        told(BROKEN),
        whole[2],
    ]
    assert isinstance(found[1].values, Few)
    assert len(found[1].values.ids) == 0


def test_no_more_is_fetched_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        row_of(one)
        for one in (
            SamplingParams(max_tokens=1, temperature=0.0),
            SamplingParams(max_tokens=1, temperature=1.0, top_k=5),
            SamplingParams(max_tokens=1, temperature=1.0, top_k=3, logprobs=2),
            SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9),
            SamplingParams(max_tokens=1, temperature=0.0, frequency_penalty=1.0),
        )
    ]
    assert asked(rows) == [0, 5, 3, WHOLE, WHOLE]
    places: list[list[int]] = []
    rows_of = numbers._rows

    def noted(logits: Tensor, wanted: np.ndarray) -> Tensor:  # type: ignore[type-arg]
        places.append(wanted.tolist())
        return rows_of(logits, wanted)

    monkeypatch.setattr(numbers, "_rows", noted)
    found = fetched(logits_of("normal", 5, 1).to(DEVICE), asked(rows), top)
    assert places == [[3, 4], [1, 2]]
    sizes = [len(one.values.ids) if isinstance(one.values, Few) else len(one.values) for one in found]
    assert sizes == [0, 5, 3, VOCAB_SIZE, VOCAB_SIZE]


@pytest.mark.parametrize(
    "ask",
    [
        lambda few: few[np.array([2, 9])],
        lambda few: few[slice(None)],
        lambda few: few[0],
        lambda few: few.ranked(3),
    ],
)
def test_a_number_that_was_not_fetched_is_an_error_not_a_guess(ask: Callable[[Few], object]) -> None:
    few = Few(10, np.array([7, 2]), np.array([3.0, 1.0], dtype=np.float32))
    assert few[np.array([2, 7, 2])].tolist() == [1.0, 3.0, 1.0]
    assert float(few[7]) == 3.0
    assert few.ranked(1).tolist() == [7]
    assert len(few) == 10
    with pytest.raises(KeyError, match="2 largest of 10"):
        ask(few)


def test_a_row_that_looks_at_more_than_it_asked_for_is_seen() -> None:
    """Planted: greedy rows ask for nothing even where log probabilities are wanted."""
    row = row_of(SamplingParams(max_tokens=1, temperature=0.0, logprobs=3))
    (found,) = fetched(logits_of("normal", 1, 1).to(DEVICE), [0], top)
    with pytest.raises(KeyError):
        pick(found.values, row, len(PROMPT), found.found)
