"""What the sampler asks of logits, against the twins: exactly, whatever the order of pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from kernels.gpu.logits import PIECE, TOP_K_MAX, top
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
@given(
    num_rows=st.integers(0, 3),
    size=SIZES,
    count=st.sampled_from([1, 2, 5, TOP_K_MAX]),
    seed=st.integers(0, 999),
    kind=KINDS,
)
def test_it_finds_what_a_stable_sort_begins_with(num_rows: int, size: int, count: int, seed: int, kind: str) -> None:
    logits, count = rows(num_rows, size, seed, kind), min(count, size)
    columns, is_finite = top(logits.to(DEVICE), count)
    assert columns.dtype == torch.int64
    assert is_finite.all()
    assert torch.equal(columns.cpu(), reference.top(logits, count)[0])
    assert columns[:, 0].tolist() == [int(row.argmax()) for row in logits.numpy()], "zeros of either sign are equal"


@few
@given(
    size=SIZES,
    at=st.integers(0, 3 * PIECE),
    number=st.sampled_from([np.nan, -np.nan, np.inf, -np.inf]),
    largest=st.booleans(),
    count=st.sampled_from([1, 3]),
)
def test_a_number_that_is_not_one_is_told_of_its_row_alone(
    size: int, at: int, number: float, largest: bool, count: int
) -> None:
    logits, count = rows(3, size, 1, "normal"), min(count, size)
    if largest:
        logits[:, -1] = 1e30
    logits[1, at % size] = number
    columns, is_finite = top(logits.to(DEVICE), count)
    twin = reference.top(logits, count)
    assert is_finite.tolist() == twin[1].tolist() == [True, False, True]
    assert columns[[0, 2]].tolist() == twin[0][[0, 2]].tolist()


def test_a_row_has_its_answer_whatever_its_company() -> None:
    logits = rows(3, PIECE + 9, 5, "few").to(DEVICE)
    together = (top(logits, 1), top(logits, 7))
    for row in range(3):
        alone = logits[row : row + 1].contiguous()
        for ours, theirs in zip((top(alone, 1), top(alone, 7)), together, strict=True):
            assert torch.equal(ours[0][0], theirs[0][row])
            assert torch.equal(ours[1][0], theirs[1][row])


@pytest.mark.parametrize("count", [0, TOP_K_MAX + 1])
def test_more_than_a_program_holds_is_refused(count: int) -> None:
    with pytest.raises(AssertionError):
        top(torch.zeros((1, 2 * TOP_K_MAX), device=DEVICE), count)
