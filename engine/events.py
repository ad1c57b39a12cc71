"""What the engine shows to whoever watches it: block events, and the evidence of each step before it is launched.

The evidence is not a report about the batch: its arrays are the very arrays that the kernels read. An observer must not
change them and must not keep them beyond the step (a copy is cheap).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

EventKind = Literal["allocate", "seal", "free", "scrub"]
EVENT_KINDS: frozenset[str] = frozenset({"allocate", "seal", "free", "scrub"})


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """One change of a block's ownership or content.

    allocate: ``domain``/``sequence_id`` own the block from now on, its generation has just grown.
    seal:     the block is full and is never written again in this generation.
    free:     the sequence let go of it; the step in flight may still read it.
    scrub:    its content was overwritten with zeros; ``domain`` and ``sequence_id`` are empty.
    """

    kind: EventKind
    step: int
    block_id: int
    generation: int
    domain: str
    sequence_id: str


@dataclass(frozen=True, slots=True)
class StepEvidence:
    """Everything that decides which KV slots a step reads and writes. Rows are in batch order; T tokens, R rows."""

    step: int
    sequence_ids: tuple[str, ...]
    domains: tuple[str, ...]
    cu_seqlens: NDArray[np.int32]  # [R+1] row r computes tokens cu_seqlens[r]..cu_seqlens[r+1]
    kv_lens: NDArray[np.int32]  # [R] tokens in the cache after this step's writes
    block_tables: NDArray[np.int32]  # [R, B], padded with -1
    slot_mapping: NDArray[np.int64]  # [T] block_id * block_size + offset of each written token


# (kind, sequence_ids, domains, block_id, detail): plain values, so that the auditor shares no type with the engine.
Violation = tuple[str, tuple[str, ...], tuple[str, ...], int, str]


class Observer(Protocol):
    def on_events(self, events: list[EngineEvent]) -> None:
        """Called in order, before the step that follows them is launched."""

    def before_launch(self, evidence: StepEvidence) -> list[Violation]:
        """Called before every launch. Sequences that a violation names are aborted and not executed."""
        ...

    def counters(self) -> dict[str, int]:
        """Figures for Stats.audit."""
        ...


class NullObserver:
    """Watches nothing. For tests and benchmarks; the gateway's worker always brings a real one."""

    def on_events(self, events: list[EngineEvent]) -> None:
        return None

    def before_launch(self, evidence: StepEvidence) -> list[Violation]:
        return []

    def counters(self) -> dict[str, int]:
        return {}
