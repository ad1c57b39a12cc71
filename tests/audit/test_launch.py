"""The arrays that kernels held against those that were approved: any other number names its row."""

import numpy as np
import pytest

from audit.launch import KernelArrays, array_problems

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
