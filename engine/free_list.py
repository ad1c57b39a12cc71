"""Blocks that nobody reads, in the order in which they are to be taken: a doubly linked list in two arrays of ids.

Intrusive: each block has its two links made once, so that taking a block out of the middle (a cached prefix is wanted
again) costs the same as taking the first, and nothing is allocated. The list is a ring through a sentinel.
"""

from collections.abc import Iterator

_OUTSIDE = -1


class FreeList:
    """Holds all of 0..num_blocks at first, in order."""

    def __init__(self, num_blocks: int) -> None:
        self._sentinel = num_blocks
        ring = num_blocks + 1
        self._next = [(block_id + 1) % ring for block_id in range(ring)]
        self._previous = [(block_id - 1) % ring for block_id in range(ring)]
        self._num_blocks = num_blocks

    def __len__(self) -> int:
        return self._num_blocks

    def __contains__(self, block_id: int) -> bool:
        return self._next[block_id] != _OUTSIDE

    def __iter__(self) -> Iterator[int]:
        block_id = self._next[self._sentinel]
        while block_id != self._sentinel:
            yield block_id
            block_id = self._next[block_id]

    def push_first(self, block_id: int) -> None:
        """To be taken next."""
        self._insert(self._sentinel, block_id)

    def push_last(self, block_id: int) -> None:
        """To be taken after all others."""
        self._insert(self._previous[self._sentinel], block_id)

    def pop_first(self) -> int:
        block_id = self._next[self._sentinel]
        self.remove(block_id)
        return block_id

    def remove(self, block_id: int) -> None:
        assert block_id in self, f"block {block_id} is not free"
        assert block_id != self._sentinel, "there is no free block"
        before, after = self._previous[block_id], self._next[block_id]
        self._next[before], self._previous[after] = after, before
        self._next[block_id] = self._previous[block_id] = _OUTSIDE
        self._num_blocks -= 1

    def _insert(self, before: int, block_id: int) -> None:
        assert block_id not in self, f"block {block_id} is free already"
        after = self._next[before]
        self._next[before] = self._previous[after] = block_id
        self._previous[block_id], self._next[block_id] = before, after
        self._num_blocks += 1
