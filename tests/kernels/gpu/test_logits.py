"""What the sampler asks of logits, against the twins: exactly, whatever the order of pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from kernels.gpu.logits import PIECE, TOP_K_MAX, greedy, top_k
from tests.kernels.gpu.steps import DEVICE, few

SIZES = st.sampled_from([1, 2, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 7])


def rows(num_rows: int, size: int, seed: int, kind: str) -> torch.Tensor:
    """``few``: three values and both zeros, so that most numbers are somebody's equals; ``bits``: any finite number."""
    random = np.random.default_rng(seed)
    if kind == "few":
        values = random.choice(np.array([-1.5, -0.0, 0.0], dtype=np.float32), (num_rows, size))
    elif kind == "bits":
        values = random.integers(0, 2**32, (num_rows, size), dtype=np.uint64).astype(np.uint32).view(np.float32)
        values = np.where(np.isfinite(values), values, np.float32(1.0))
    else:
        values = random.standard_normal((num_rows, size), dtype=np.float32) * np.float32(20.0)
    return torch.from_numpy(values)


KINDS = st.sampled_from(["few", "bits", "normal"])


@few
@given(num_rows=st.integers(0, 3), size=SIZES, seed=st.integers(0, 999), kind=KINDS)
def test_greedy_is_the_first_of_the_largest(num_rows: int, size: int, seed: int, kind: str) -> None:
    logits = rows(num_rows, size, seed, kind)
    places, is_finite = greedy(logits.to(DEVICE))
    assert places.dtype == torch.int64
    assert is_finite.all()
    assert places.tolist() == [int(row.argmax()) for row in logits.numpy()]
    assert torch.equal(places.cpu(), reference.greedy(logits)[0])


@few
@given(
    size=SIZES,
    at=st.integers(0, 3 * PIECE),
    number=st.sampled_from([np.nan, -np.nan, np.inf, -np.inf]),
    largest=st.booleans(),
)
def test_a_number_that_is_not_one_is_told_of_its_row_alone(size: int, at: int, number: float, largest: bool) -> None:
    logits = rows(3, size, 1, "normal")
    if largest:
        logits[:, -1] = 1e30
    logits[1, at % size] = number
    places, is_finite = greedy(logits.to(DEVICE))
    twin = reference.greedy(logits)
    assert is_finite.tolist() == twin[1].tolist() == [True, False, True]
    assert places[[0, 2]].tolist() == twin[0][[0, 2]].tolist()


@few
@given(size=SIZES, k=st.sampled_from([1, 2, 5, TOP_K_MAX]), seed=st.integers(0, 999), kind=KINDS)
def test_top_k_is_what_a_stable_sort_begins_with(size: int, k: int, seed: int, kind: str) -> None:
    k = min(k, size)
    logits = rows(2, size, seed, kind)
    values, places = top_k(logits.to(DEVICE), k)
    want = reference.top_k(logits, k)
    assert torch.equal(places.cpu(), want[1])
    assert torch.equal(values.cpu(), want[0]), "zeros of either sign are equal"
    assert torch.equal(places.cpu()[:, 0], reference.greedy(logits)[0])


def test_a_row_has_its_answer_whatever_its_company() -> None:
    logits = rows(3, PIECE + 9, 5, "few").to(DEVICE)
    together = (*greedy(logits), *top_k(logits, 7))
    for row in range(3):
        alone = logits[row : row + 1].contiguous()
        for ours, theirs in zip((*greedy(alone), *top_k(alone, 7)), together, strict=True):
            assert torch.equal(ours[0], theirs[row])


@pytest.mark.parametrize("k", [0, TOP_K_MAX + 1])
def test_more_than_a_program_holds_is_refused(k: int) -> None:
    with pytest.raises(AssertionError):
        top_k(torch.zeros((1, 2 * TOP_K_MAX), device=DEVICE), k)
