"""Who owns which KV block. Rules, checked at every call:

1. A block in use has one owner domain. It reaches another domain only through free, and is zeroed before it does.
2. Its generation grows with every allocation: (block_id, generation) names one content of it for ever.
3. Allocation is all or nothing.
4. A released block waits behind a fence until no launched step can still touch it.
5. Only a sealed block is ever published, and only a published block is ever shared: by sequences of its own domain,
   which read it and never write it.

      free --allocate--> writing --seal--> sealed <--share (published)-- free
        ^                   \\                /
        |                    +---release----+      (reference count 0)
        +--- fence passed --- fenced
                              any --quarantine--> quarantined (for good)

A published block that nobody reads any more is free like any other: it keeps its content and its owner's name and can
be shared again until it is taken for something else, which ends its publication first. Free blocks without a
publication are taken first, then published ones, the longest unread first, as far as engine/cache/cache_shares.py lets
them go. A domain that caches more than its ceiling loses its own longest unread ones.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from engine.cache.cache_shares import CacheShares
from engine.cache.free_list import FreeLists
from engine.cache.prefix_index import Prefix, PrefixIndex
from engine.errors import OutOfBlocksError
from engine.events import EngineEvent, EventKind


class BlockState(Enum):
    FREE = "free"
    WRITING = "writing"
    SEALED = "sealed"
    FENCED = "fenced"
    QUARANTINED = "quarantined"


IN_USE = frozenset({BlockState.WRITING, BlockState.SEALED})


@dataclass(slots=True)
class Block:
    block_id: int
    domain: str = ""  # owner, while in use
    content_domain: str = ""  # whose numbers lie in it; "" while zeroed
    generation: int = 0
    num_references: int = 0
    state: BlockState = BlockState.FREE
    fence_step: int = 0
    unread_since: int = 0  # a count of blocks put by, while published and free


class BlockPool:
    """``scrub`` zeroes the content of blocks; ``on_event`` hears of every change, in order."""

    def __init__(
        self,
        num_blocks: int,
        *,
        scrub: Callable[[list[int]], None],
        on_event: Callable[[EngineEvent], None],
        shares: CacheShares | None = None,
    ) -> None:
        assert num_blocks > 0
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.step = 0  # the step that is being put together or executed; names events
        self.num_by_domain: dict[str, int] = {}  # blocks in use; one that several sequences read counts once
        self.num_scrubbed = 0
        self.num_usable = num_blocks  # blocks that a sequence could ever get: all but the quarantined
        self.shares = shares or CacheShares()
        self._free = FreeLists(num_blocks)  # list "": unpublished; the others: what each domain has cached
        self._num_put_by = 0
        self._available: dict[str, int] = {}  # remembered until something changes
        self._published = PrefixIndex()
        self._fenced: list[int] = []
        self._launched_step = 0
        self._completed_step = 0
        self._scrub = scrub
        self._on_event = on_event

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_free(self) -> int:
        """Blocks that can be had, published ones included."""
        return len(self._free)

    @property
    def num_cached_by_domain(self) -> dict[str, int]:
        """Published blocks that nobody reads."""
        return {domain: num for domain, num in self._free.lengths.items() if domain}

    @property
    def num_promised(self) -> int:
        """Blocks that a sequence can get at the most, whatever others have cached."""
        return self.num_usable - self.shares.num_reserved(self.num_usable)

    def floor(self, domain: str) -> int:
        """Cached blocks of each other domain that stay when ``domain`` allocates."""
        if not self.shares.floor_percent:
            return 0
        holders = self.num_by_domain.keys() | self.num_cached_by_domain.keys() | {domain}
        return self.shares.floor(self.num_usable, len(holders))

    def num_available(self, domain: str) -> int:
        """Blocks that ``domain`` can have now: free ones, less those that the floors of others keep."""
        if not self.shares.floor_percent:
            return len(self._free)
        if domain not in self._available:
            floor = self.floor(domain)
            kept = sum(min(num, floor) for other, num in self.num_cached_by_domain.items() if other != domain)
            self._available[domain] = len(self._free) - kept
        return self._available[domain]

    def num_unread(self, block_ids: Sequence[int]) -> int:
        """How many of these published blocks nobody reads."""
        return sum(block_id in self._free for block_id in block_ids)

    def num_attainable(self, domain: str, block_ids: Sequence[int]) -> int:
        """Blocks that ``domain`` can have for certain once these references are let go; a block with several is named
        as often."""
        counts = Counter(block_ids)
        released = sum(self.blocks[block_id].num_references == num for block_id, num in counts.items())
        return len(self._free) + released - self.shares.num_reserved(self.num_usable)

    @property
    def num_published(self) -> int:
        return len(self._published)

    def knows(self, key: bytes) -> bool:
        """Whether a find of this key can succeed at all."""
        return self._published.knows(key)

    def find(self, prefix: Prefix) -> int | None:
        """A block that holds this prefix and can be shared now."""
        block_id = self._published.find(prefix)
        if block_id is None or self.blocks[block_id].state is BlockState.FENCED:
            return None
        return block_id

    def allocate(self, num_blocks: int, *, domain: str, sequence_id: str, shared: Sequence[int] = ()) -> list[int]:
        """A sequence's next blocks: the published blocks ``shared``, then ``num_blocks`` free ones for ``domain``.
        Raises OutOfBlocksError, having changed nothing."""
        num_available = self.num_available(domain) - self.num_unread(shared)
        if num_blocks > num_available:
            raise OutOfBlocksError(f"{num_blocks} blocks wanted, {num_available} to be had")
        floor = self.floor(domain)
        self._available.clear()
        for block_id in shared:
            self._share(self.blocks[block_id], domain, sequence_id)
        taken = [self._take(domain, floor) for _ in range(num_blocks)]
        self.forget([block.block_id for block in taken])
        dirty = [block for block in taken if block.content_domain not in ("", domain)]
        if dirty:
            self._scrub([block.block_id for block in dirty])
            self.num_scrubbed += len(dirty)
            for block in dirty:
                block.content_domain = ""
                self._emit("scrub", block, domain="", sequence_id="")
        for block in taken:
            assert block.state is BlockState.FREE, f"block {block.block_id} is {block.state.value}"
            block.state = BlockState.WRITING
            block.content_domain = domain
            block.generation += 1
            self._refer(block, domain)
            self._emit("allocate", block, domain=domain, sequence_id=sequence_id)
        return [*shared, *(block.block_id for block in taken)]

    def seal(self, block_id: int, *, sequence_id: str) -> None:
        """The block is full: from now on it is only read."""
        block = self.blocks[block_id]
        assert block.state is BlockState.WRITING, f"block {block_id} is {block.state.value}"
        block.state = BlockState.SEALED
        self._emit("seal", block, domain=block.domain, sequence_id=sequence_id)

    def publish(self, block_id: int, prefix: Prefix, *, sequence_id: str) -> None:
        """Let later sequences of the block's domain find it. Nothing happens where the prefix is published already."""
        block = self.blocks[block_id]
        assert block.state is BlockState.SEALED, f"block {block_id} is {block.state.value}"
        assert block.domain == prefix.domain, f"block {block_id} belongs to another domain"
        if self._published.add(block_id, prefix):
            self._emit("publish", block, domain=block.domain, sequence_id=sequence_id)

    def forget(self, block_ids: Sequence[int]) -> None:
        """End the publication of blocks; who reads them goes on reading. Blocks that were not published are ignored."""
        for block_id in block_ids:
            if self._published.drop(block_id):
                block = self.blocks[block_id]
                if block_id in self._free:
                    self._free.remove(block_id)
                    self._free.push_first(block_id)
                    self._available.clear()
                self._emit("evict", block, domain=block.content_domain, sequence_id="")

    def forget_domains(self, domains: Sequence[str]) -> None:
        """End every publication of these domains: nothing that they have computed is trusted by later sequences."""
        self.forget(self._published.blocks_of(domains))

    def erase(self, domain: str) -> int:
        """Zero every free block that holds numbers of a domain, cached ones first forgotten; how many there were. Its
        sequences have ended, and no step is under way."""
        self.forget_domains([domain])
        dirty = [block for block in self.blocks if block.content_domain == domain and block.state is BlockState.FREE]
        if dirty:
            self._scrub([block.block_id for block in dirty])
            self.num_scrubbed += len(dirty)
        for block in dirty:
            block.content_domain = ""
            self._emit("scrub", block, domain="", sequence_id="")
        return len(dirty)

    def release(self, block_ids: Sequence[int], *, sequence_id: str) -> None:
        """Let go of a sequence's blocks; at the last reference a block goes behind the fence. The tail goes first, so
        that the beginning of a sequence, which others are likelier to share, stays longest in the free list."""
        for block_id in reversed(block_ids):
            block = self.blocks[block_id]
            if not block.num_references:
                assert block.state is BlockState.QUARANTINED, f"block {block_id} is {block.state.value}"
                continue
            self._drop_reference(block, sequence_id)
            if block.num_references or block.state is BlockState.QUARANTINED:
                continue
            block.state = BlockState.FENCED
            block.fence_step = self._launched_step
            self._fenced.append(block_id)
        self._pass_fence()

    def quarantine(self, block_ids: Sequence[int], *, sequence_id: str) -> None:
        """Take a sequence's blocks out of use for good: evidence, and never handed out again."""
        self.forget(block_ids)
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.num_references:
                self._drop_reference(block, sequence_id)
            if block_id in self._free:
                self._free.remove(block_id)
            if block.state is BlockState.FENCED:
                self._fenced.remove(block_id)
            if block.state is not BlockState.QUARANTINED:
                self.num_usable -= 1
                block.state = BlockState.QUARANTINED
                self._emit("quarantine", block, domain="", sequence_id="")
        self._available.clear()

    def launched(self, step: int) -> None:
        """A step that may touch blocks is under way: whatever is released now waits until it is done."""
        self._launched_step = step

    def completed(self, step: int) -> None:
        """No step up to ``step`` touches the cache any more."""
        self._completed_step = step
        self._pass_fence()

    def _pass_fence(self) -> None:
        waiting = []
        for block_id in self._fenced:
            block = self.blocks[block_id]
            if block.fence_step > self._completed_step:
                waiting.append(block_id)
                continue
            block.state = BlockState.FREE
            if block_id in self._published:
                self._put_by(block)
            else:
                self._free.push_first(block_id)
        self._fenced = waiting
        self._available.clear()

    def _put_by(self, block: Block) -> None:
        """Nobody reads this published block any more: it is cached, within its domain's ceiling."""
        self._num_put_by += 1
        block.unread_since = self._num_put_by
        domain = block.content_domain
        self._free.push_last(block.block_id, domain)
        if self._free.lengths[domain] > self.shares.ceiling(self.num_usable):
            self.forget([self._free.first_of(domain)])

    def _take(self, domain: str, floor: int) -> Block:
        """The next free block for ``domain``: an unpublished one, or else the longest unread that may go."""
        lengths = self._free.lengths
        if lengths[""]:
            block_id = self._free.first_of("")
        else:
            owners = (owner for owner, num in lengths.items() if owner and (owner == domain or num > floor))
            block_id = min(map(self._free.first_of, owners), key=lambda oldest: self.blocks[oldest].unread_since)
        self._free.remove(block_id)
        return self.blocks[block_id]

    def _share(self, block: Block, domain: str, sequence_id: str) -> None:
        assert block.block_id in self._published, f"block {block.block_id} is not published"
        assert block.content_domain == domain, f"block {block.block_id} belongs to another domain"
        if block.state is BlockState.FREE:
            self._free.remove(block.block_id)
            block.state = BlockState.SEALED
        assert block.state is BlockState.SEALED, f"block {block.block_id} is {block.state.value}"
        self._refer(block, domain)
        self._emit("share", block, domain=domain, sequence_id=sequence_id)

    def _refer(self, block: Block, domain: str) -> None:
        if not block.num_references:
            block.domain = domain
            self.num_by_domain[domain] = self.num_by_domain.get(domain, 0) + 1
        block.num_references += 1

    def _drop_reference(self, block: Block, sequence_id: str) -> None:
        self._emit("free", block, domain=block.domain, sequence_id=sequence_id)
        block.num_references -= 1
        if block.num_references:
            return
        left = self.num_by_domain[block.domain] - 1
        if left:
            self.num_by_domain[block.domain] = left
        else:
            del self.num_by_domain[block.domain]
        block.domain = ""

    def _emit(self, kind: EventKind, block: Block, *, domain: str, sequence_id: str) -> None:
        self._on_event(EngineEvent(kind, self.step, block.block_id, block.generation, domain, sequence_id))
