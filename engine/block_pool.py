"""Who owns which KV block. Rules, checked at every call:

1. A block in use has one owner domain. It reaches another domain only through free, and is zeroed before it does.
2. Its generation grows with every allocation: (block_id, generation) names one use of it for ever.
3. Allocation is all or nothing.
4. A released block waits behind a fence until no launched step can still touch it.

      free --allocate--> writing --seal--> sealed
        ^                   \\                /
        |                    +---release----+      (reference count 0)
        +--- fence passed --- fenced
                              any --quarantine--> quarantined (for good)

The free list is in order of release, so a freed block rests as long as possible before it is used again.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

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


class BlockPool:
    """``scrub`` zeroes the content of blocks; ``on_event`` hears of every change, in order."""

    def __init__(
        self, num_blocks: int, *, scrub: Callable[[list[int]], None], on_event: Callable[[EngineEvent], None]
    ) -> None:
        assert num_blocks > 0
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.step = 0  # the step that is being put together or executed; names events
        self.num_by_domain: dict[str, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict((block_id, None) for block_id in range(num_blocks))
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
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Blocks that a sequence could ever get: all but the quarantined."""
        return sum(block.state is not BlockState.QUARANTINED for block in self.blocks)

    def allocate(self, num_blocks: int, *, domain: str, sequence_id: str) -> list[int]:
        """Take ``num_blocks`` free blocks for ``domain``. Raises OutOfBlocksError, having changed nothing."""
        if num_blocks > len(self._free):
            raise OutOfBlocksError(f"{num_blocks} blocks wanted, {len(self._free)} free")
        taken = [self.blocks[self._free.popitem(last=False)[0]] for _ in range(num_blocks)]
        dirty = [block for block in taken if block.content_domain not in ("", domain)]
        if dirty:
            self._scrub([block.block_id for block in dirty])
            for block in dirty:
                block.content_domain = ""
                self._emit("scrub", block, domain="", sequence_id="")
        for block in taken:
            assert block.state is BlockState.FREE, f"block {block.block_id} is {block.state.value}"
            block.state = BlockState.WRITING
            block.domain = block.content_domain = domain
            block.generation += 1
            block.num_references = 1
            self._emit("allocate", block, domain=domain, sequence_id=sequence_id)
        if num_blocks:
            self.num_by_domain[domain] = self.num_by_domain.get(domain, 0) + num_blocks
        return [block.block_id for block in taken]

    def seal(self, block_id: int, *, sequence_id: str) -> None:
        """The block is full: from now on it is only read."""
        block = self.blocks[block_id]
        assert block.state is BlockState.WRITING, f"block {block_id} is {block.state.value}"
        block.state = BlockState.SEALED
        self._emit("seal", block, domain=block.domain, sequence_id=sequence_id)

    def release(self, block_ids: Sequence[int], *, sequence_id: str) -> None:
        """Let go of a sequence's blocks; at the last reference a block goes behind the fence. The tail goes first, so
        that the beginning of a sequence rests longest in the free list."""
        for block_id in reversed(block_ids):
            block = self.blocks[block_id]
            if block.state is BlockState.QUARANTINED:
                continue
            assert block.state in IN_USE, f"block {block_id} is {block.state.value}"
            block.num_references -= 1
            if block.num_references:
                continue
            self._drop_owner(block, sequence_id)
            block.state = BlockState.FENCED
            block.fence_step = self._launched_step
            self._fenced.append(block_id)
        self._pass_fence()

    def quarantine(self, block_ids: Sequence[int], *, sequence_id: str) -> None:
        """Take blocks out of use for good: evidence, and never handed out again. Repeats are harmless."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.state is BlockState.QUARANTINED:
                continue
            if block.state in IN_USE:
                self._drop_owner(block, sequence_id)
            self._free.pop(block_id, None)
            if block.state is BlockState.FENCED:
                self._fenced.remove(block_id)
            block.num_references = 0
            block.state = BlockState.QUARANTINED

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
            if block.fence_step <= self._completed_step:
                block.state = BlockState.FREE
                self._free[block_id] = None
            else:
                waiting.append(block_id)
        self._fenced = waiting

    def _drop_owner(self, block: Block, sequence_id: str) -> None:
        self._emit("free", block, domain=block.domain, sequence_id=sequence_id)
        left = self.num_by_domain[block.domain] - 1
        if left:
            self.num_by_domain[block.domain] = left
        else:
            del self.num_by_domain[block.domain]
        block.domain = ""

    def _emit(self, kind: EventKind, block: Block, *, domain: str, sequence_id: str) -> None:
        self._on_event(EngineEvent(kind, self.step, block.block_id, block.generation, domain, sequence_id))
