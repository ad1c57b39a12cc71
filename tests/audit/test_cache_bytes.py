"""Sampled bytes: no alarm while nothing changes, and no stray token in every layer stays unseen."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.runtime.cache_bytes import CacheBytes

NUM_BLOCKS, BLOCK_SIZE = 5, 3
SLOTS = np.arange(NUM_BLOCKS * BLOCK_SIZE)


def cache(seed: int, *, word: str = "u8", shapes: tuple[tuple[int, int], ...] = ((4, 6), (2, 3))) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    limit = np.iinfo(word).max
    return [random.integers(1, limit, (places, NUM_BLOCKS, BLOCK_SIZE, words), word) for places, words in shapes]


@given(st.integers(0, 99), st.sampled_from(["u8", "u4", "u2", "u1"]), st.integers(0, len(SLOTS) - 1))
def test_a_stray_token_is_seen_in_whichever_slot_and_only_there(seed: int, word: str, slot: int) -> None:
    memory = cache(seed, word=word)
    read = CacheBytes(memory, NUM_BLOCKS, BLOCK_SIZE, seed)
    generations = np.arange(len(SLOTS)) // BLOCK_SIZE + 1
    read.note(SLOTS, generations)
    assert not read.changed(SLOTS, generations).any()
    block, offset = divmod(slot, BLOCK_SIZE)
    for part in memory:
        part[:, block, offset] ^= 1
    assert np.flatnonzero(read.changed(SLOTS, generations)).tolist() == [slot]
    assert not read.changed(SLOTS, generations + 1).any(), "of another generation nothing was noted"


@given(st.integers(0, 99), st.integers(0, NUM_BLOCKS - 1))
def test_a_block_is_zero_when_all_of_it_is(seed: int, block: int) -> None:
    memory = cache(seed)
    read = CacheBytes(memory, NUM_BLOCKS, BLOCK_SIZE, seed)
    assert not read.is_zero(block, 1)
    for part in memory:
        part[:, block] = 0
    assert read.is_zero(block, 1)
    memory[0][:, block, 1] = memory[1][:, block, 1] = 7
    assert not read.is_zero(block, 1), "one slot was left out"


class Elsewhere:
    """A view that is no array: its words are fetched by block and offset."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory, self.shape, self.dtype = memory, memory.shape, memory.dtype

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, at: tuple[np.ndarray, ...]) -> np.ndarray:
        return self._memory[at]


@given(st.integers(0, 99), st.sampled_from(["u8", "u4", "u2", "u1"]), st.integers(1, 7))
def test_one_view_in_one_piece_is_read_at_the_same_places(seed: int, word: str, num_words: int) -> None:
    (memory,) = cache(seed, word=word, shapes=((4, num_words),))
    generations = np.arange(len(SLOTS)) // BLOCK_SIZE + seed
    here, elsewhere = (CacheBytes([one], NUM_BLOCKS, BLOCK_SIZE, seed) for one in (memory, Elsewhere(memory)))
    told = [read._words(SLOTS, generations) for read in (here, elsewhere)]
    assert np.array_equal(*told)
    assert told[0].all(axis=0).sum() == min(4, num_words)


def test_without_memory_nothing_is_read() -> None:
    read = CacheBytes([], NUM_BLOCKS, BLOCK_SIZE, 0)
    read.note(SLOTS, SLOTS)
    assert not read.can_read
    assert not read.changed(SLOTS, SLOTS).any()
    assert read.is_zero(0, 1)
    assert not len(read.choose(10, 5))


def test_a_budget_is_kept() -> None:
    read = CacheBytes(cache(0), NUM_BLOCKS, BLOCK_SIZE, 0)
    assert read.choose(7, 8).tolist() == list(range(7))
    chosen = read.choose(1_000, 8)
    assert len(chosen) == 8
    assert 0 <= chosen.min() <= chosen.max() < 1_000


def test_views_of_another_shape_are_refused() -> None:
    for wrong in (np.zeros((1, NUM_BLOCKS, BLOCK_SIZE), np.uint64), np.zeros((1, 4, BLOCK_SIZE, 2), np.uint64)):
        with pytest.raises(ValueError, match="shape"):
            CacheBytes([wrong], NUM_BLOCKS, BLOCK_SIZE, 0)
