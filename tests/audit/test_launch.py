"""The arrays that kernels held against those that were approved: any other number names its row."""

import numpy as np
import pytest

from audit.runtime.launch import PADDING_SLOT, KernelArrays, array_problems

APPROVED = KernelArrays(
    token_ids=np.array([3, 4, 5]),
    positions=np.array([0, 1, 7]),
    wanted=np.array([1, 2]),
    sampled_positions=np.array([2, 8]),
    sampled_rows=np.array([4, 0]),
    cu_seqlens=np.array([0, 2, 3]),
    kv_lens=np.array([2, 8]),
    block_tables=np.array([[1, -1], [2, 3]]),
    slot_mapping=np.array([4, 5, 15]),
)


def test_equal_arrays_of_other_types_are_no_problem() -> None:
    launched = KernelArrays(*(array.astype(np.int32) for array in APPROVED))
    assert array_problems(APPROVED, launched) == []


@pytest.mark.parametrize(
    ("name", "at", "rows"),
    [
        ("token_ids", 0, [0]),
        ("positions", 2, [1]),
        ("wanted", 1, [1]),
        ("sampled_positions", 0, [0]),
        ("sampled_rows", 1, [1]),
        ("cu_seqlens", 1, [0, 1]),
        ("kv_lens", 1, [1]),
        ("block_tables", (1, 0), [1]),
        ("slot_mapping", 1, [0]),
    ],
)
def test_one_other_number_names_its_row(name: str, at: object, rows: list[int]) -> None:
    launched = APPROVED.copy()
    getattr(launched, name)[at] += 1
    assert array_problems(APPROVED, launched) == [(row, name) for row in rows]


def test_an_array_of_another_size_is_everybodys() -> None:
    launched = APPROVED.copy()._replace(kv_lens=np.array([2]))
    assert array_problems(APPROVED, launched) == [(-1, "kv_lens")]


def padded(**changes: object) -> KernelArrays:
    """Two rows that fill up behind the step's two."""
    added = {
        "token_ids": [0, 0],
        "positions": [0, 0],
        "kv_lens": [0, 0],
        "block_tables": [[-1, -1]] * 2,
        "slot_mapping": [PADDING_SLOT] * 2,
        "cu_seqlens": [4, 5],
        **changes,
    }
    return APPROVED._replace(
        **{name: np.concatenate((getattr(APPROVED, name), np.array(more))) for name, more in added.items()}
    )


def test_rows_that_only_fill_up_are_no_problem() -> None:
    assert array_problems(APPROVED, padded()) == []


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("kv_lens", [0, 1]),
        ("block_tables", [[-1, -1], [-1, 0]]),
        ("slot_mapping", [PADDING_SLOT, 4]),
        ("slot_mapping", [PADDING_SLOT]),
        ("slot_mapping", [-1, PADDING_SLOT]),
        ("token_ids", [0]),
        ("cu_seqlens", [3, 5]),
    ],
)
def test_rows_behind_the_last_that_do_anything_are_everybodys(name: str, more: list[object]) -> None:
    assert (-1, "rows behind the last") in array_problems(APPROVED, padded(**{name: more}))


def test_what_was_approved_is_compared_before_padding_too() -> None:
    launched = padded()
    launched.kv_lens[1] += 1
    assert array_problems(APPROVED, launched) == [(1, "kv_lens")]
