"""What the engine shows to whoever watches it: block events, the evidence of each step before it is launched, the
tokens that the launch gave, and the step's outputs before they leave.

The evidence is not a report about the batch: its arrays are the very arrays that the kernels read, and its sampling
states are what lies in the rows that will be sampled from. An observer must not change them and must not keep them
beyond the step (a copy is cheap).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from engine.protocol import SamplingParams, Submit, TokenOutput

if TYPE_CHECKING:
    from engine.errors import BrokenOffError
    from engine.sampling.sampler import Picks

EventKind = Literal["begin", "end", "allocate", "seal", "publish", "share", "evict", "free", "scrub", "quarantine"]
EVENT_KINDS: frozenset[str] = frozenset(get_args(EventKind))


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """One change of a block's ownership or content, or a sequence's arrival or end.

    begin:    a sequence was taken in with these ``token_ids``, ``cache_salt`` and ``sampling``; ``block_id`` is -1.
    end:      it is over and holds no block; ``block_id`` is -1.
    allocate: ``domain``/``sequence_id`` own the block from now on, its generation has just grown.
    seal:     the block is full and is never written again in this generation.
    publish:  the block may be shared from now on by sequences of its domain that begin with the same tokens.
    share:    the sequence reads the published block as the next of its own blocks; it never writes it.
    evict:    the block may not be shared any more; who reads it goes on. ``sequence_id`` is empty.
    free:     the sequence let go of it; the step in flight may still read it.
    scrub:    its content was overwritten with zeros; ``domain`` and ``sequence_id`` are empty.

    quarantine: the block is put away for good; ``domain`` and ``sequence_id`` are empty.

    A sequence's allocate and share events come in the order of its block table.
    """

    kind: EventKind
    step: int
    block_id: int
    generation: int
    domain: str
    sequence_id: str
    token_ids: tuple[int, ...] = ()
    cache_salt: bytes = b""
    sampling: SamplingParams | None = None


def begin_event(step: int, submit: Submit) -> EngineEvent:
    """A sequence is taken in."""
    prompt = tuple(submit.prompt_token_ids)
    return EngineEvent(
        "begin", step, -1, 0, submit.domain, submit.sequence_id, prompt, submit.cache_salt, submit.sampling
    )


@dataclass(frozen=True, slots=True)
class SamplingState:
    """What lies in a stable row when it is about to be sampled from (engine/sampling/row.py): the very objects, not
    what they should be. A row without a sequence has an empty ``sequence_id``."""

    sequence_id: str = ""
    sampling: SamplingParams | None = None
    num_prompt_tokens: int = 0
    token_ids: Sequence[int] = ()
    bias_ids: NDArray[np.int64] | None = None
    bias_values: NDArray[np.float64] | None = None
    has_form: bool = False
    has_bias: bool = False
    has_penalties: bool = False
    plain: bool = True  # the logits stay as they are
    form: str = ""  # the grammar that the row's matcher was made for
    form_token_ids: Sequence[int] = ()  # the answer as far as the matcher has read it
    seen: NDArray[np.bool_] | None = None  # [V], for penalties; None before they are first needed
    counts: NDArray[np.int64] | None = None  # [V]
    num_counted: int = 0  # tokens of prompt and answer in ``seen`` and ``counts``


@dataclass(frozen=True, slots=True)
class Scored:
    """The places of one row that are looked at for the prompt's own next tokens."""

    index: int  # batch row
    row: int  # its stable row
    next_token_ids: tuple[int, ...]  # of each place


@dataclass(frozen=True, slots=True)
class KernelArrays:
    """What the kernels held during a launch: their own arrays, not the evidence that was shown before it."""

    token_ids: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T]
    wanted: NDArray[np.int64]  # [S + P] of the rows that sample, then of the scored places
    sampled_positions: NDArray[np.int64]  # [S]
    sampled_rows: NDArray[np.int64]  # [S]
    cu_seqlens: NDArray[np.int32]  # [R+1]
    kv_lens: NDArray[np.int32]  # [R]
    block_tables: NDArray[np.int32]  # [R, B]
    slot_mapping: NDArray[np.int64]  # [T]


@dataclass(frozen=True, slots=True)
class HeadWork:
    """What the head multiplied, and what became of it: the very hidden states, uint16 where they are bfloat16, and of
    each place the logit, as it was read, of the token that was drawn or scored there. NaN where there is no token."""

    hidden: NDArray[np.uint16] | NDArray[np.float32]  # [S + P, K]
    logits: NDArray[np.float32]  # [S + P]


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """logits = scale * hidden W^T: which tensor of the model's files W is, and whether the model rounds it, and has its
    hidden states, in bfloat16."""

    tensor: str
    scale: float
    is_bfloat16: bool


class Words(Protocol):
    """What an observer needs of a view of the KV cache: a numpy array where the cache lies in this process's memory,
    engine/cache/device_words.py where it lies on a GPU."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, at: tuple[NDArray[np.int64], ...], /) -> NDArray[Any]: ...


@dataclass(frozen=True, slots=True)
class Watched:
    """What an observer may look at from the start on. ``memory``: views of the KV cache itself, unsigned integers
    [places, num_blocks, block_size, words], a place being a layer's keys or values; it must not write there.
    ``digest``: of all bytes of a block under a key, as [2]; None where it cannot be had. ``head``: None where launches
    do not show what the head was given."""

    num_blocks: int
    block_size: int
    model_dir: Path
    memory: tuple[Words, ...]
    digest: Callable[[int, tuple[int, int]], NDArray[np.int64]] | None = None
    exact: bool = True  # what a sequence says does not depend on its company, bit for bit
    head: HeadFacts | None = None


@dataclass(frozen=True, slots=True)
class StepEvidence:
    """Everything that decides what a step computes, which KV slots it reads and writes, and how it samples. Rows are in
    batch order; T tokens, R rows, S of them sample."""

    step: int
    sequence_ids: tuple[str, ...]
    domains: tuple[str, ...]
    token_ids: NDArray[np.int64]  # [T] what is computed
    cu_seqlens: NDArray[np.int32]  # [R+1] row r computes tokens cu_seqlens[r]..cu_seqlens[r+1]
    kv_lens: NDArray[np.int32]  # [R] tokens in the cache after this step's writes
    block_tables: NDArray[np.int32]  # [R, B], padded with -1
    slot_mapping: NDArray[np.int64]  # [T] block_id * block_size + offset of each written token
    sampled_tokens: NDArray[np.int64]  # [S] places in the batch whose logits are wanted
    sampled_positions: NDArray[np.int64]  # [S] place in its sequence of each token to be sampled: keys random numbers
    sampled_rows: NDArray[np.int64]  # [S] stable row of each
    sampled_index: tuple[int, ...]  # [S] batch row of each: its sequence gets the token
    sampling: tuple[SamplingState, ...]  # [S] what lies in those stable rows
    positions: NDArray[np.int64]  # [T] place of each token in its sequence
    scored_tokens: NDArray[np.int64]  # [P] places in the batch whose logits are wanted for the prompt, row after row
    scored: tuple[Scored, ...]  # whose they are: P in all
    num_blocks_free: int  # by the pool's own count, -1 where that is not known


# (kind, sequence_ids, domains, block_id, detail): plain values, so that the auditor shares no type with the engine.
Violation = tuple[str, tuple[str, ...], tuple[str, ...], int, str]


class Observer(Protocol):
    def on_events(self, events: list[EngineEvent]) -> None:
        """Called in order, before the step that follows them is launched."""

    def before_launch(self, evidence: StepEvidence) -> list[Violation]:
        """Called before every launch. Sequences that a violation names are aborted and not executed."""
        ...

    def after_launch(self, step: int, picks: "Picks") -> None:
        """What the launch gave and which arrays the kernels held, before anything is done with it."""

    def broken_off(self, step: int, broken: "BrokenOffError") -> None:
        """In place of after_launch: the launch ended between two layers, and nothing of it counts."""

    def before_release(self, step: int, outputs: Sequence[TokenOutput]) -> list[Violation]:
        """Called with outputs before they leave, a step's or what ends between two. Those that a violation names are
        withheld."""
        ...

    def next_run(self, *, idle: bool) -> Submit | None:
        """A sequence that the observer wants to be run for itself (engine/own_runs.py): alone where the engine is
        idle, beside others where it is not. Its outputs, a refusal too, come through before_release and go nowhere
        else."""
        ...

    def forget_domain(self, domain: str) -> Sequence[str]:
        """Whose domain it is has left: nothing that it said is kept. Returns the domains of the observer's own runs
        that may have left something of it."""
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

    def after_launch(self, step: int, picks: "Picks") -> None:
        return None

    def broken_off(self, step: int, broken: "BrokenOffError") -> None:
        return None

    def before_release(self, step: int, outputs: Sequence[TokenOutput]) -> list[Violation]:
        return []

    def next_run(self, *, idle: bool) -> Submit | None:
        return None

    def forget_domain(self, domain: str) -> Sequence[str]:
        return ()

    def counters(self) -> dict[str, int]:
        return {}
