"""Blocks that nobody reads, in several lists: each a ring through a sentinel, all in the same two arrays of ids.

Intrusive: each block has its two links made once, so that taking a block out of the middle (a cached prefix is wanted
again) costs the same as taking the first, and nothing is allocated. A block is in one list at most.
"""

from collections.abc import Iterator

_OUTSIDE = -1


class FreeLists:
    """List "" holds all of 0..num_blocks at first, in order. Other lists are made when something is put into them and
    are gone when they are empty."""

    def __init__(self, num_blocks: int) -> None:
        ring = num_blocks + 1
        self._next = [(block_id + 1) % ring for block_id in range(ring)]
        self._previous = [(block_id - 1) % ring for block_id in range(ring)]
        self._list_of = [""] * num_blocks
        self._sentinels = {"": num_blocks}
        self._spare_sentinels: list[int] = []
        self.lengths = {"": num_blocks}  # of the lists that are there; "" always is
        self._num_blocks = num_blocks

    def __len__(self) -> int:
        return self._num_blocks

    def __contains__(self, block_id: int) -> bool:
        return self._next[block_id] != _OUTSIDE

    def blocks_of(self, name: str) -> Iterator[int]:
        sentinel = self._sentinels.get(name)
        if sentinel is not None:
            block_id = self._next[sentinel]
            while block_id != sentinel:
                yield block_id
                block_id = self._next[block_id]

    def first_of(self, name: str) -> int:
        """The next to be taken of a list that is not empty."""
        assert self.lengths[name], f"no block is free in {name!r}"
        return self._next[self._sentinels[name]]

    def push_first(self, block_id: int, name: str = "") -> None:
        """To be taken next of its list."""
        self._insert(self._sentinel(name), block_id, name)

    def push_last(self, block_id: int, name: str = "") -> None:
        """To be taken after all others of its list."""
        self._insert(self._previous[self._sentinel(name)], block_id, name)

    def remove(self, block_id: int) -> None:
        assert block_id in self, f"block {block_id} is not free"
        name = self._list_of[block_id]
        before, after = self._previous[block_id], self._next[block_id]
        self._next[before], self._previous[after] = after, before
        self._next[block_id] = self._previous[block_id] = _OUTSIDE
        self._num_blocks -= 1
        self.lengths[name] -= 1
        if name and not self.lengths[name]:
            del self.lengths[name]
            self._spare_sentinels.append(self._sentinels.pop(name))

    def _sentinel(self, name: str) -> int:
        if name not in self._sentinels:
            if not self._spare_sentinels:
                self._spare_sentinels.append(len(self._next))
                self._next.append(len(self._next))
                self._previous.append(len(self._previous))
            sentinel = self._spare_sentinels.pop()
            self._next[sentinel] = self._previous[sentinel] = sentinel
            self._sentinels[name] = sentinel
            self.lengths[name] = 0
        return self._sentinels[name]

    def _insert(self, before: int, block_id: int, name: str) -> None:
        assert block_id not in self, f"block {block_id} is free already"
        after = self._next[before]
        self._next[before] = self._previous[after] = block_id
        self._previous[block_id], self._next[block_id] = before, after
        self._list_of[block_id] = name
        self._num_blocks += 1
        self.lengths[name] += 1
