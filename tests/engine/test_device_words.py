"""The auditor's way into a cache on a GPU, on the CPU's tensors: the same words as a view of the memory itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from audit.runtime.cache_bytes import CacheBytes
from engine.cache.device_words import DeviceWords
from engine.cache.kv_cache import KVCache
from engine.models.facts import CacheLayer

NUM_BLOCKS, BLOCK_SIZE = 5, 3
SLOTS = np.arange(NUM_BLOCKS * BLOCK_SIZE)
GENERATIONS = np.ones(len(SLOTS), dtype=np.int64)


def cache(head_size: int, dtype: torch.dtype) -> KVCache:
    """Layers of two shapes."""
    made = KVCache(
        layers=[CacheLayer(1, head_size), CacheLayer(2, head_size), CacheLayer(1, head_size)],
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        dtype=dtype,
    )
    for memory in made._memory.values():
        memory.view(torch.uint8).random_(generator=torch.Generator().manual_seed(head_size))
    return made


def on_device(made: KVCache) -> list[DeviceWords]:
    return [DeviceWords(memory) for memory in made._memory.values()]


@given(
    head_size=st.sampled_from([1, 2, 3, 4, 6, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
    seed=st.integers(0, 999),
)
def test_the_words_are_those_of_the_memory(head_size: int, dtype: torch.dtype, seed: int) -> None:
    made = cache(head_size, dtype)
    random = np.random.default_rng(seed)
    for ours, view in zip(on_device(made), made.words(), strict=True):
        assert isinstance(view, np.ndarray), "on the CPU nothing is copied"
        assert (ours.shape, ours.dtype, len(ours)) == (view.shape, view.dtype, len(view))
        place, block, offset = (random.integers(-size, size, (7, 1)) for size in view.shape[:3])
        columns = random.integers(view.shape[3], size=(7, 4))
        at = (place, block, offset, columns)
        assert np.array_equal(ours[at], view[at])
        assert ours[tuple(index[:0] for index in at)].shape == (0, 4)


@given(slot=st.integers(0, len(SLOTS) - 1), seed=st.integers(0, 99))
def test_an_auditor_sees_the_same_through_either(slot: int, seed: int) -> None:
    made = cache(4, torch.bfloat16)
    through = [CacheBytes(memory, NUM_BLOCKS, BLOCK_SIZE, seed) for memory in (on_device(made), made.words())]
    for read in through:
        read.note(SLOTS, GENERATIONS)
        assert not read.changed(SLOTS, GENERATIONS).any()
    block, offset = divmod(slot, BLOCK_SIZE)
    for memory in made._memory.values():
        memory.view(torch.uint8)[:, :, block, offset] ^= 1
    for read in through:
        assert np.flatnonzero(read.changed(SLOTS, GENERATIONS)).tolist() == [slot]
    made.scrub([block])
    for read in through:
        assert read.is_zero(block, 1)
        assert not read.is_zero((block + 1) % NUM_BLOCKS, 1)


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("beyond", [0, -1])
def test_what_is_not_there_is_refused_before_the_device_is_asked(axis: int, beyond: int) -> None:
    (words, _) = on_device(cache(4, torch.float32))
    at = [np.zeros(1, dtype=np.int64) for _ in range(4)]
    at[axis][0] = words.shape[axis] if beyond == 0 else -words.shape[axis] - 1
    with pytest.raises(IndexError, match=f"axis {axis}"):
        words[tuple(at)]
