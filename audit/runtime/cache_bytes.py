"""The bytes in the cache, sampled: does a slot still hold what was written into it, is a clean block really zero?

Of each slot a few words are read, at one place (a layer's keys or values) that is drawn for that slot and that
generation of its block. What is remembered of them is one number: a multiply-add hash with secret odd factors, so that
two different contents agree by chance once in 2^64.

A stray token is written in every layer, so whichever slot it lands in, one of the words that are read has changed. A
write into one place of one slot only is seen with the chance that this place was drawn.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
WORDS_MAX = 4  # read of each slot
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64 (Steele et al., OOPSLA 2014)


class CacheView(Protocol):
    """What is asked of a view of the cache: a numpy array is one, and so is whatever fetches words from elsewhere."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, at: tuple[IntArray, ...], /) -> npt.NDArray[Any]: ...


class CacheBytes:
    """``memory``: views of the cache itself, unsigned integers [places, num_blocks, block_size, words]; none: nothing
    is read and everything is said to be fine. ``seed``: where to read."""

    def __init__(self, memory: Sequence[CacheView], num_blocks: int, block_size: int, seed: int) -> None:
        for part in memory:
            if part.dtype.kind != "u" or len(part.shape) != 4 or part.shape[1:3] != (num_blocks, block_size):
                raise ValueError(f"a view of the cache has shape {part.shape} and type {part.dtype}")
        self._memory = [part for part in memory if prod(part.shape)]
        self._first_place = np.cumsum([0, *(len(part) for part in self._memory)])
        self._flat: npt.NDArray[Any] | None = None  # the one view that there is, where it lies in one piece
        if len(self._memory) == 1 and isinstance(self._memory[0], np.ndarray) and self._memory[0].flags.c_contiguous:
            self._flat = self._memory[0].reshape(-1)
        self._block_size = block_size
        random = np.random.default_rng(seed)
        self._key = np.uint64(random.integers(2**63))
        self._factors = random.integers(2**63, size=WORDS_MAX, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._random = random
        self._hashes = np.zeros(num_blocks * block_size, np.uint64)
        self._generation = np.full(num_blocks * block_size, -1, np.int64)  # of the block when the slot was noted

    @property
    def can_read(self) -> bool:
        return bool(self._memory)

    def note(self, slots: IntArray, generations: IntArray) -> None:
        """Remember what these slots hold now; ``generations`` are their blocks'."""
        if self._memory and len(slots):
            self._hashes[slots] = self._hash(slots, generations)
            self._generation[slots] = generations

    def changed(self, slots: IntArray, generations: IntArray) -> BoolArray:
        """Whether each slot holds something else than when it was noted; False where it was not, in this
        generation."""
        if not self._memory or not len(slots):
            return np.zeros(len(slots), np.bool_)
        known = self._generation[slots] == generations
        changed: BoolArray = known & (self._hashes[slots] != self._hash(slots, generations))
        return changed

    def is_zero(self, block_id: int, generation: int) -> bool:
        """Whether what is read of every slot of the block is zero."""
        if not self._memory:
            return True
        slots = np.arange(block_id * self._block_size, (block_id + 1) * self._block_size)
        return not self._words(slots, np.full(len(slots), generation)).any()

    def choose(self, num_slots: int, num_chosen: int) -> IntArray:
        """Which of ``num_slots`` to read: all, or ``num_chosen`` drawn with replacement."""
        if not self._memory or num_slots == 0:
            return np.zeros(0, np.int64)
        return np.arange(num_slots) if num_slots <= num_chosen else self._random.integers(num_slots, size=num_chosen)

    def _hash(self, slots: IntArray, generations: IntArray) -> npt.NDArray[np.uint64]:
        hashes: npt.NDArray[np.uint64] = (self._words(slots, generations) * self._factors).sum(axis=1, dtype=np.uint64)
        return hashes

    def _words(self, slots: IntArray, generations: IntArray) -> npt.NDArray[np.uint64]:
        """[len(slots), WORDS_MAX]; 0 where a slot has fewer."""
        drawn = self._draw(slots, generations)
        place = (drawn % np.uint64(self._first_place[-1])).astype(np.int64)
        block, offset = slots // self._block_size, slots % self._block_size
        if self._flat is not None:
            return self._words_of_one(drawn, place, slots)
        words = np.zeros((len(slots), WORDS_MAX), np.uint64)
        for first, part in zip(self._first_place[:-1], self._memory, strict=True):
            here = np.flatnonzero((place >= first) & (place < first + len(part)))
            num_words = part.shape[3]
            width = min(WORDS_MAX, num_words)
            begin = (drawn[here] >> np.uint64(32)).astype(np.int64) % (num_words - width + 1)
            columns = begin[:, None] + np.arange(width)
            words[here, :width] = part[(place[here] - first)[:, None], block[here, None], offset[here, None], columns]
        return words

    def _words_of_one(self, drawn: npt.NDArray[np.uint64], place: IntArray, slots: IntArray) -> npt.NDArray[np.uint64]:
        """The same of the one view that there is, by a single index: this is most of what bytes cost."""
        assert self._flat is not None
        num_words = self._memory[0].shape[3]
        width = min(WORDS_MAX, num_words)
        begin = (drawn >> np.uint64(32)).astype(np.int64) % (num_words - width + 1)
        at = (place * len(self._hashes) + slots) * num_words + begin
        words = self._flat.take(at[:, None] + np.arange(width)).astype(np.uint64, copy=False)
        return words if width == WORDS_MAX else np.pad(words, ((0, 0), (0, WORDS_MAX - width)))

    def _draw(self, slots: IntArray, generations: IntArray) -> npt.NDArray[np.uint64]:
        mixed = slots.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + generations.astype(np.uint64) * _MIX[0]
        mixed += self._key
        for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * factor
        drawn: npt.NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
        return drawn
