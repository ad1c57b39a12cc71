"""Scrubbing: the named blocks are zeros in every layer, no other byte has changed, whoever writes the zeros."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.cache.kv_cache import KVCache
from engine.models.facts import CacheLayer
from tests.kernels.native import isas

NUM_BLOCKS = 5
SHAPES = st.builds(CacheLayer, num_kv_heads=st.sampled_from([1, 3]), head_size=st.sampled_from([2, 7, 16]))
by_whom = pytest.mark.parametrize(
    "native",
    [False, pytest.param(True, marks=pytest.mark.skipif(not isas(), reason="no native kernels: run make native"))],
    ids=["torch", "native"],
)


def filled(layers: list[CacheLayer], dtype: torch.dtype, *, native: bool) -> KVCache:
    cache = KVCache(layers=layers, num_blocks=NUM_BLOCKS, block_size=3, dtype=dtype)
    if not native:
        cache._library = None
    assert (cache.digester() is not None) == native
    for index in range(len(layers)):
        for tensor in cache.layer(index):
            tensor.fill_(index + 1.5)
    cache.block_tags[:] = 7
    return cache


@by_whom
@given(
    layers=st.lists(SHAPES, min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    block_ids=st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=7),
)
def test_the_named_blocks_are_zeros_and_nothing_else_has_changed(
    native: bool, layers: list[CacheLayer], dtype: torch.dtype, block_ids: list[int]
) -> None:
    cache = filled(layers, dtype, native=native)
    cache.scrub(block_ids)
    for index in range(len(layers)):
        for tensor in cache.layer(index):
            for block in range(NUM_BLOCKS):
                assert (tensor[block] == (0.0 if block in block_ids else index + 1.5)).all()
    assert cache.block_tags.tolist() == [0 if block in block_ids else 7 for block in range(NUM_BLOCKS)]
    assert [cache.is_zero(block) for block in range(NUM_BLOCKS)] == [block in block_ids for block in range(NUM_BLOCKS)]


@by_whom
@pytest.mark.parametrize("block_id", [-1, NUM_BLOCKS, 2 * NUM_BLOCKS])
def test_a_block_that_is_not_there_is_refused_and_none_is_touched(native: bool, block_id: int) -> None:
    cache = filled([CacheLayer(1, 2), CacheLayer(1, 2)], torch.bfloat16, native=native)
    with pytest.raises(IndexError, match="from 0 to 4"):
        cache.scrub([0, block_id])
    assert not any(cache.is_zero(block) for block in range(NUM_BLOCKS))
    assert cache.block_tags.tolist() == [7] * NUM_BLOCKS
    if (digest := cache.digester()) is not None:
        with pytest.raises(IndexError, match="from 0 to 4"):
            digest(block_id, (1, 2))
