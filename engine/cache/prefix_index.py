"""Which published block holds which prefix. It knows nothing of owners' counts or of who reads: that is the pool's.

A find compares all that was put in, not only the key: domain, the key of the block before, and the token ids. One key
names at most one block: where two sequences compute the same prefix at once, the first to publish stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prefix:
    """A full block's place in a chain of blocks; see engine/cache/prefix_key.py."""

    domain: str
    parent: bytes
    key: bytes
    token_ids: tuple[int, ...]


class PrefixIndex:
    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._prefix_of: dict[int, Prefix] = {}

    def __len__(self) -> int:
        return len(self._prefix_of)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._prefix_of

    def add(self, block_id: int, prefix: Prefix) -> bool:
        """False, and nothing done, where another block has the key already."""
        assert block_id not in self._prefix_of, f"block {block_id} is published already"
        if prefix.key in self._block_of:
            return False
        self._block_of[prefix.key] = block_id
        self._prefix_of[block_id] = prefix
        return True

    def knows(self, key: bytes) -> bool:
        """Whether a find can succeed at all: cheap, and says nothing yet about owner and tokens."""
        return key in self._block_of

    def find(self, prefix: Prefix) -> int | None:
        """The block that holds exactly this prefix."""
        block_id = self._block_of.get(prefix.key)
        return block_id if block_id is not None and self._prefix_of[block_id] == prefix else None

    def drop(self, block_id: int) -> bool:
        """Forget what the block holds. False where it was not published."""
        prefix = self._prefix_of.pop(block_id, None)
        if prefix is None:
            return False
        del self._block_of[prefix.key]
        return True

    def blocks_of(self, domains: Sequence[str]) -> list[int]:
        """Every published block of these domains."""
        return [block_id for block_id, prefix in self._prefix_of.items() if prefix.domain in domains]
