"""What a sequence needs of the pool, and whether the pool has it: blocks for all its known tokens, shared where its
beginning is published."""

from collections.abc import Sequence as Line

from engine.cache.block_pool import BlockPool
from engine.sequence import Sequence


class Room:
    def __init__(self, pool: BlockPool, block_size: int, *, prefix_cache: bool) -> None:
        self._pool = pool
        self._block_size = block_size
        self._prefix_cache = prefix_cache

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        return self.num_blocks_for(num_tokens) - len(sequence.block_ids)

    def num_needed(self, sequence: Sequence) -> int:
        """Available blocks that admitting it takes: new ones, and those of its beginning that nobody reads now."""
        missing = self.num_missing(sequence, sequence.num_tokens)
        if sequence.block_ids:
            return missing
        shared = self.published_prefix(sequence)
        return missing - len(shared) + self._pool.num_unread(shared)

    def fits(self, sequence: Sequence) -> bool:
        available = self._pool.num_available(sequence.domain)
        missing = self.num_missing(sequence, sequence.num_tokens)
        if missing <= available:
            return True
        if sequence.block_ids or missing - self._num_known(sequence) > available:
            return False
        return self.num_needed(sequence) <= available

    def published_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the sequence's beginning, as far as they can be shared."""
        shared: list[int] = []
        if self._prefix_cache:
            for index in range(sequence.num_tokens_shareable // self._block_size):
                block_id = self._pool.find(sequence.prefix(index, self._block_size))
                if block_id is None:
                    break
                shared.append(block_id)
        return shared

    def enter(self, sequence: Sequence) -> None:
        """Blocks for all its tokens; what is published counts as computed. The pool has them."""
        shared: list[int] = []
        if not sequence.block_ids:
            shared = self.published_prefix(sequence)
            sequence.num_computed_tokens = len(shared) * self._block_size
        self.grow(sequence, sequence.num_tokens, shared)

    def grow(self, sequence: Sequence, num_tokens: int, shared: Line[int] = ()) -> None:
        missing = self.num_missing(sequence, num_tokens) - len(shared)
        if missing > 0:
            sequence.block_ids += self._pool.allocate(
                missing, domain=sequence.domain, sequence_id=sequence.sequence_id, shared=shared
            )

    def _num_known(self, sequence: Sequence) -> int:
        """At least as many as `published_prefix` has, and much cheaper."""
        num_known = 0
        if self._prefix_cache:
            while num_known < sequence.num_tokens_shareable // self._block_size:
                if not self._pool.knows(sequence.key(num_known, self._block_size)):
                    break
                num_known += 1
        return num_known
