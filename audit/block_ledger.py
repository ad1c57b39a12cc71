"""The auditor's own ledger of KV blocks, built from events alone.

A block changes hands only so:

                 allocate             seal
          free  ----------------> writing -----> sealed
            ^                        |             |
            +--------- free ---------+-------------+

and between two domains there is a scrub while it is free. Generations only grow. Any other event is a violation and its
block is quarantined: whoever gets or touches it from then on is flagged, until the worker restarts.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

FREE, WRITING, SEALED, QUARANTINED = 0, 1, 2, 3
NOBODY = -1  # no domain, no sequence
STRANGER = -2  # a row whose domain or sequence owns no block: equal to no owner

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class BlockLedger:
    """What the events say. One entry per block in each array; names are kept as small numbers."""

    block_size: int
    state: npt.NDArray[np.int8]
    domain: IntArray  # owner, NOBODY when free
    sequence: IntArray
    generation: IntArray
    residue: IntArray  # the domain whose bytes may still lie in the block, NOBODY after a scrub
    filled: IntArray  # slots written since allocation
    domain_ids: dict[str, int]
    domain_names: list[str]
    sequence_ids: dict[str, int]
    sequence_names: dict[int, str]
    num_owned: dict[int, int]  # sequence -> blocks, to forget sequences that own none
    next_sequence: int

    @classmethod
    def empty(cls, num_blocks: int, block_size: int) -> "BlockLedger":
        def full(value: int) -> IntArray:
            return np.full(num_blocks, value, np.int64)

        state = np.full(num_blocks, FREE, np.int8)
        return cls(
            block_size,
            state,
            full(NOBODY),
            full(NOBODY),
            full(-1),
            full(NOBODY),
            full(0),
            {},
            [],
            {},
            {},
            {},
            next_sequence=0,
        )

    def copy(self) -> "BlockLedger":
        return replace(
            self,
            state=self.state.copy(),
            domain=self.domain.copy(),
            sequence=self.sequence.copy(),
            generation=self.generation.copy(),
            residue=self.residue.copy(),
            filled=self.filled.copy(),
            domain_ids=dict(self.domain_ids),
            domain_names=list(self.domain_names),
            sequence_ids=dict(self.sequence_ids),
            sequence_names=dict(self.sequence_names),
            num_owned=dict(self.num_owned),
        )

    def owner(self, block_id: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(sequence ids, domains) of the owner: one of each, or none."""
        if self.domain[block_id] == NOBODY:
            return (), ()
        return (self.sequence_names[int(self.sequence[block_id])],), (self.domain_names[int(self.domain[block_id])],)

    def apply(self, kind: str, block_id: int, generation: int, domain: str, sequence_id: str) -> tuple[str, str] | None:
        """Apply an event; (rule, detail) when it is illegal. An illegal event quarantines its block."""
        problem = self._problem(kind, block_id, generation, domain, sequence_id)
        if problem is not None:
            if 0 <= block_id < len(self.state):
                self.state[block_id] = QUARANTINED
            return problem
        if self.state[block_id] == QUARANTINED:
            return None
        if kind == "allocate":
            self._allocate(block_id, generation, domain, sequence_id)
        elif kind == "seal":
            self.state[block_id] = SEALED
        elif kind == "free":
            self._free(block_id)
        else:
            self.residue[block_id] = NOBODY
        return None

    def _problem(
        self, kind: str, block_id: int, generation: int, domain: str, sequence_id: str
    ) -> tuple[str, str] | None:
        if kind not in ("allocate", "seal", "free", "scrub"):
            return "unknown_event", f"no event is called {kind!r}"
        if not 0 <= block_id < len(self.state):
            return "block_out_of_range", f"{kind} of block {block_id} in a pool of {len(self.state)}"
        state, last = int(self.state[block_id]), int(self.generation[block_id])
        if state == QUARANTINED:
            # The engine puts such a block away after the first report; only giving it out or writing on is new.
            return None if kind in ("free", "scrub") else ("quarantined_block", f"{kind} of a block in quarantine")
        if kind == "scrub":
            return None if state == FREE else ("scrub_of_live_block", "scrub of a block that is in use")
        if kind == "allocate":
            residue = int(self.residue[block_id])
            if state != FREE:
                return "double_allocate", "allocate of a block that is in use"
            if generation <= last:
                return "stale_generation", f"allocate with generation {generation} after {last}"
            if residue not in (NOBODY, self.domain_ids.get(domain, STRANGER)):
                return "unscrubbed_reuse", "the block changes domain and was not scrubbed"
            return None
        if state == FREE:
            return f"{kind}_of_free_block", f"{kind} of a block that is free"
        if generation != last:
            return "stale_generation", f"{kind} with generation {generation}, the block has {last}"
        owner = (int(self.domain[block_id]), int(self.sequence[block_id]))
        if owner != (self.domain_ids.get(domain, STRANGER), self.sequence_ids.get(sequence_id, STRANGER)):
            return f"foreign_{kind}", f"{kind} by a sequence that does not own the block"
        if kind == "seal" and state != WRITING:
            return "seal_of_sealed_block", "seal of a block that is sealed"
        return None

    def _allocate(self, block_id: int, generation: int, domain: str, sequence_id: str) -> None:
        if domain not in self.domain_ids:
            self.domain_ids[domain] = len(self.domain_names)
            self.domain_names.append(domain)
        if sequence_id not in self.sequence_ids:
            self.sequence_ids[sequence_id] = self.next_sequence
            self.sequence_names[self.next_sequence] = sequence_id
            self.next_sequence += 1
        owner, sequence = self.domain_ids[domain], self.sequence_ids[sequence_id]
        self.num_owned[sequence] = self.num_owned.get(sequence, 0) + 1
        self.state[block_id] = WRITING
        self.domain[block_id] = self.residue[block_id] = owner
        self.sequence[block_id] = sequence
        self.generation[block_id] = generation
        self.filled[block_id] = 0

    def _free(self, block_id: int) -> None:
        sequence = int(self.sequence[block_id])
        self.num_owned[sequence] -= 1
        if not self.num_owned[sequence]:
            del self.num_owned[sequence]
            del self.sequence_ids[self.sequence_names.pop(sequence)]
        self.state[block_id] = FREE
        self.domain[block_id] = self.sequence[block_id] = NOBODY
        self.filled[block_id] = 0
