"""Rope and the write into the cache against their twins, and what is not written."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.gpu.steps import close, few, run, twin, with_tables
from tests.kernels.native import Features, Shape, bits, make_step, random_row


@few
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    head_size=st.sampled_from([2, 14, 16]),
    block_size=st.sampled_from([1, 5, 16]),
    rotate=st.booleans(),
    seed=st.integers(0, 999),
)
def test_slots_are_written_as_their_twins_write_them(
    dtype: torch.dtype, heads: tuple[int, int], head_size: int, block_size: int, rotate: bool, seed: int
) -> None:
    shape = Shape(*heads, head_size, block_size, dtype)
    spans = [(5, 6), (0, 3)]
    step = make_step(shape, [random_row(shape, 6, seed), random_row(shape, 3, seed + 1)], spans, seed)
    got = run(shape, step, features=Features(rotate=rotate))
    _, key_cache, value_cache = twin(shape, step, Features(rotate=rotate))
    untouched = torch.ones(key_cache.shape[0] * block_size, dtype=torch.bool)
    untouched[step.tables.slot_mapping] = False
    for ours, theirs in ((got.key_cache, key_cache), (got.value_cache, value_cache)):
        close(ours.nan_to_num(7.0), theirs.nan_to_num(7.0), dtype)
        assert torch.equal(bits(ours).flatten(0, 1)[untouched], bits(theirs).flatten(0, 1)[untouched])
    assert torch.equal(bits(got.value_cache), bits(value_cache)), "values are copied, not computed"
    assert got.refused_tokens == []


def test_a_block_that_is_nobodys_becomes_the_writers() -> None:
    shape = Shape(2, 1, 8, 4, torch.float32)
    step = make_step(shape, [random_row(shape, 5, 0)], [(0, 5)])
    free = with_tables(step, block_tags=np.zeros_like(step.tables.block_tags))
    got = run(shape, free, check_owners=True)
    assert got.block_tags.tolist() == step.tables.block_tags.tolist()
    assert got.refused_tokens == []


@pytest.mark.parametrize("where", ["before", "behind", "far behind", "foreign"])
def test_a_slot_of_somebody_else_is_not_written(where: str) -> None:
    shape = Shape(2, 1, 8, 4, torch.float32)
    step = make_step(shape, [random_row(shape, 5, 0), random_row(shape, 6, 1)], [(4, 5), (5, 6)])
    slots = step.tables.slot_mapping.copy()
    foreign = int(step.tables.block_tables[1, 0])
    slots[0] = {"before": -1, "behind": len(step.tables.block_tags) * 4, "far behind": 2**40, "foreign": foreign * 4}[
        where
    ]
    got = run(shape, with_tables(step, slot_mapping=slots))
    assert got.refused_tokens == [0]
    others = np.flatnonzero(np.arange(len(step.tables.block_tags) * 4) != slots[1])
    assert torch.equal(bits(got.key_cache).flatten(0, 1)[others], bits(step.key_cache).flatten(0, 1)[others])
    assert torch.equal(bits(got.value_cache).flatten(0, 1)[others], bits(step.value_cache).flatten(0, 1)[others])
    assert got.block_tags.tolist() == step.tables.block_tags.tolist()
