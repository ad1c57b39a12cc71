"""Digests of whole blocks: every byte of every layer, when a block is full and when it is found in the prefix cache.

The samples of cache_bytes.py read a few words of each slot; a write into one place of one layer may miss them. A
digest misses nothing, and reads everything: so there is a budget of blocks for each step, spent on whoever comes first.
The digest is a function from outside that is keyed and runs where the bytes are; it is no cryptographic hash.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Digest = Callable[[int, tuple[int, int]], npt.NDArray[Any]]  # block, key -> 64-bit integers [2]


class BlockDigests:
    """``digest`` None or ``per_step`` 0: nothing is read and everything is said to be fine."""

    def __init__(self, digest: Digest | None, num_blocks: int, per_step: int, seed: int) -> None:
        self.num_taken = 0
        self.num_compared = 0
        self._digest = digest
        self._per_step = per_step if digest is not None else 0
        self._left = self._per_step
        key = np.random.default_rng(seed).integers(2**63, size=2).tolist()
        self._key = key[0], key[1]
        self._known = np.zeros((num_blocks, 2), np.int64)
        self._generation = np.full(num_blocks, -1, np.int64)  # in which the digest was taken

    def new_step(self) -> None:
        self._left = self._per_step

    def seal(self, block_id: int, generation: int) -> None:
        """The block is full: remember what it holds, if the budget lasts."""
        if self._left:
            self.num_taken += 1
            self._known[block_id] = self._take(block_id)
            self._generation[block_id] = generation

    def changed(self, block_id: int, generation: int) -> bool:
        """Whether a block holds something else than when it was full; False where that is not known, or not looked
        at."""
        if not self._left or self._generation[block_id] != generation:
            return False
        self.num_compared += 1
        return not np.array_equal(self._known[block_id], self._take(block_id))

    def _take(self, block_id: int) -> npt.NDArray[Any]:
        assert self._digest is not None
        self._left -= 1
        taken: npt.NDArray[Any] = self._digest(block_id, self._key)
        return taken
