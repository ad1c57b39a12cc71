"""The auditor's own ledger of KV blocks, built from events alone.

A block changes hands only so:

                 allocate             seal               publish
          free  ----------------> writing -----> sealed ---------> sealed and published
            ^                        |             |                  |           ^
            +--------- free ---------+-------------+        last free |           | share
            |                                                         v           |
            +------------------------- evict ---------------------- published, unread

and between two domains there is a scrub while it is free. Generations only grow. A block has one writer; it has several
readers only if each of them shared it after it was published, is of its domain, and consists of the same tokens up to
the block's end (sequence_ledger.py). Any other event is a violation and its block is quarantined: whoever gets or
touches it from then on is flagged, until the worker restarts. A `quarantine` event does the same without a violation:
the engine has put the block away.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from audit.runtime.sequence_ledger import AuditedSequence

FREE, WRITING, SEALED, QUARANTINED, UNREAD = 0, 1, 2, 3, 4  # unread: published, and nobody holds it
NOBODY = -1  # no domain
STRANGER = -2  # a domain that was never heard of: equal to no owner
KINDS = ("begin", "end", "allocate", "seal", "publish", "share", "evict", "free", "scrub", "quarantine")

IntArray = npt.NDArray[np.int64]
Problem = tuple[str, str]  # rule, detail


class Happening(NamedTuple):
    """An event in the engine; tokens, salt and sampling only come with `begin`."""

    kind: str
    block_id: int
    generation: int
    domain: str
    sequence_id: str
    tokens: tuple[int, ...] = ()
    salt: bytes = b""
    facts: Any = None


@dataclass(slots=True)
class BlockLedger:
    """What the events say. One entry per block in each array or list; names of domains are kept as small numbers."""

    block_size: int
    state: npt.NDArray[np.int8]
    domain: IntArray  # owner, NOBODY when free
    generation: IntArray
    residue: IntArray  # the domain whose bytes may still lie in the block, NOBODY after a scrub
    filled: IntArray  # slots written since allocation
    holders: list[frozenset[str]]  # sequences that read or write it
    published: list[bytes | None]  # digest of the tokens up to its end, while it may be shared
    domain_ids: dict[str, int]
    domain_names: list[str]
    sequences: dict[str, AuditedSequence]
    ended: dict[str, AuditedSequence]  # since the last outputs were checked: their last one may still be on its way

    @classmethod
    def empty(cls, num_blocks: int, block_size: int) -> "BlockLedger":
        def full(value: int) -> IntArray:
            return np.full(num_blocks, value, np.int64)

        state = np.full(num_blocks, FREE, np.int8)
        nobody: list[frozenset[str]] = [frozenset()] * num_blocks
        unpublished: list[bytes | None] = [None] * num_blocks
        return cls(
            block_size, state, full(NOBODY), full(-1), full(NOBODY), full(0), nobody, unpublished, {}, [], {}, {}
        )

    def copy(self) -> "BlockLedger":
        """Independent of this one, but for the sequences that both know: those must be left alone."""
        return replace(
            self,
            state=self.state.copy(),
            domain=self.domain.copy(),
            generation=self.generation.copy(),
            residue=self.residue.copy(),
            filled=self.filled.copy(),
            holders=list(self.holders),
            published=list(self.published),
            domain_ids=dict(self.domain_ids),
            domain_names=list(self.domain_names),
            sequences=dict(self.sequences),
            ended={},
        )

    def owner(self, block_id: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(sequence ids, domains) of those who hold it: none where it is free."""
        if self.domain[block_id] == NOBODY:
            return (), ()
        return tuple(sorted(self.holders[block_id])), (self.domain_names[int(self.domain[block_id])],)

    def apply(self, event: Happening) -> Problem | None:
        """Apply an event; (rule, detail) when it is illegal. An illegal event quarantines its block."""
        if event.kind in ("begin", "end"):
            return self._begin(event) if event.kind == "begin" else self._end(event)
        problem = self._problem(event)
        if problem is not None:
            if 0 <= event.block_id < len(self.state):
                self.state[event.block_id] = QUARANTINED
            return problem
        if self.state[event.block_id] != QUARANTINED:
            getattr(self, f"_{event.kind}")(event)
        return None

    def _problem(self, event: Happening) -> Problem | None:
        kind, block_id = event.kind, event.block_id
        if kind not in KINDS:
            return "unknown_event", f"no event is called {kind!r}"
        if not 0 <= block_id < len(self.state):
            return "block_out_of_range", f"{kind} of block {block_id} in a pool of {len(self.state)}"
        state, last = int(self.state[block_id]), int(self.generation[block_id])
        if state == QUARANTINED:
            # The engine puts such a block away after the first report; only giving it out or writing on is new.
            quiet = kind in ("free", "scrub", "evict", "quarantine")
            return None if quiet else ("quarantined_block", f"{kind} of a block in quarantine")
        if kind == "quarantine":
            return None  # from whatever state: never given out again
        if kind == "scrub":
            return None if state == FREE else ("scrub_of_live_block", "scrub of a block that is in use or published")
        if kind == "allocate":
            return self._allocate_problem(event, state, last)
        if state == FREE:
            return f"{kind}_of_free_block", f"{kind} of a block that is free"
        if event.generation != last:
            return "stale_generation", f"{kind} with generation {event.generation}, the block has {last}"
        if self.domain[block_id] != self.domain_ids.get(event.domain, STRANGER):
            return f"foreign_{kind}", f"{kind} by another domain than the block's"
        if kind == "evict":
            return None if self.published[block_id] is not None else ("evict_of_unpublished_block", "never published")
        if kind == "share":
            return self._share_problem(event)
        if event.sequence_id not in self.holders[block_id]:
            return f"foreign_{kind}", f"{kind} by a sequence that does not hold the block"
        if kind == "seal" and state != WRITING:
            return "seal_of_sealed_block", "seal of a block that is sealed"
        return self._publish_problem(event, state) if kind == "publish" else None

    def _allocate_problem(self, event: Happening, state: int, last: int) -> Problem | None:
        residue = int(self.residue[event.block_id])
        if state == UNREAD:
            return "allocate_of_published_block", "the block is given out and may still be shared"
        if state != FREE:
            return "double_allocate", "allocate of a block that is in use"
        if event.generation <= last:
            return "stale_generation", f"allocate with generation {event.generation} after {last}"
        if residue not in (NOBODY, self.domain_ids.get(event.domain, STRANGER)):
            return "unscrubbed_reuse", "the block changes domain and was not scrubbed"
        return self._stranger(event)

    def _publish_problem(self, event: Happening, state: int) -> Problem | None:
        if state != SEALED or self.filled[event.block_id] != self.block_size:
            return "publish_of_unsealed_block", "publish of a block that is not sealed and full"
        if self.published[event.block_id] is not None:
            return "double_publish", "publish of a block that is published"
        return None

    def _share_problem(self, event: Happening) -> Problem | None:
        digest = self.published[event.block_id]
        if digest is None:
            return "share_of_unpublished_block", "share of a block that was not sealed and published"
        problem = self._stranger(event)
        if problem is not None:
            return problem
        sequence = self.sequences[event.sequence_id]
        if event.sequence_id in self.holders[event.block_id]:
            return "double_share", "share of a block that the sequence holds"
        if sequence.digest(len(sequence.blocks), self.block_size) != digest:
            return "foreign_prefix", "the block does not hold the sequence's next tokens after the same beginning"
        return None

    def _stranger(self, event: Happening) -> Problem | None:
        sequence = self.sequences.get(event.sequence_id)
        if sequence is None:
            return "unknown_sequence", f"{event.kind} by a sequence that never began"
        if sequence.domain != event.domain:
            return "wrong_domain", f"{event.kind} in another domain than the sequence's"
        return None

    def _begin(self, event: Happening) -> Problem | None:
        if event.sequence_id in self.sequences:
            return "double_begin", "begin of a sequence that is alive"
        if event.domain not in self.domain_ids:
            self.domain_ids[event.domain] = len(self.domain_names)
            self.domain_names.append(event.domain)
        self.sequences[event.sequence_id] = AuditedSequence(
            event.sequence_id, event.domain, event.salt, list(event.tokens), event.facts
        )
        return None

    def _end(self, event: Happening) -> Problem | None:
        sequence = self.sequences.pop(event.sequence_id, None)
        if sequence is None:
            return "unknown_sequence", "end of a sequence that never began"
        self.ended[event.sequence_id] = sequence
        held = [block_id for block_id in sequence.blocks if self.state[block_id] != QUARANTINED]
        self.state[held] = QUARANTINED
        return ("end_with_blocks", f"the sequence ended and holds {len(held)} blocks") if held else None

    def _allocate(self, event: Happening) -> None:
        block_id = event.block_id
        self.state[block_id] = WRITING
        self.domain[block_id] = self.residue[block_id] = self.domain_ids[event.domain]
        self.generation[block_id] = event.generation
        self.filled[block_id] = 0
        self._hold(event)

    def _hold(self, event: Happening) -> None:
        self.holders[event.block_id] |= {event.sequence_id}
        self.sequences[event.sequence_id].blocks.append(event.block_id)

    def _seal(self, event: Happening) -> None:
        self.state[event.block_id] = SEALED

    def _publish(self, event: Happening) -> None:
        sequence = self.sequences[event.sequence_id]
        self.published[event.block_id] = sequence.digest(sequence.blocks.index(event.block_id), self.block_size)

    def _share(self, event: Happening) -> None:
        self.state[event.block_id] = SEALED
        self._hold(event)

    def _evict(self, event: Happening) -> None:
        self.published[event.block_id] = None
        if self.state[event.block_id] == UNREAD:
            self._put_back(event.block_id)

    def _free(self, event: Happening) -> None:
        block_id = event.block_id
        self.holders[block_id] -= {event.sequence_id}
        self.sequences[event.sequence_id].blocks.remove(block_id)
        if self.holders[block_id]:
            return
        if self.published[block_id] is not None:
            self.state[block_id] = UNREAD
        else:
            self._put_back(block_id)

    def _scrub(self, event: Happening) -> None:
        self.residue[event.block_id] = NOBODY

    def _quarantine(self, event: Happening) -> None:
        self.state[event.block_id] = QUARANTINED
        self.published[event.block_id] = None

    def _put_back(self, block_id: int) -> None:
        self.state[block_id] = FREE
        self.domain[block_id] = NOBODY
        self.filled[block_id] = 0
