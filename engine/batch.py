"""One step as arrays: built once, shown to the auditor, then read by the kernels. The same memory, no copies, no
context objects."""

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.events import SamplingState, Scored, StepEvidence, Violation
from engine.scheduling.schedule import ScheduledRow
from kernels.backend import OwnershipError


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens in R rows; S of the rows get a new token, P places are looked at for the prompt's own next token. What
    the evidence has too is the same object there."""

    token_ids: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T] place of each token in its sequence
    sampled_tokens: NDArray[np.int64]  # [S] places in the batch whose logits are wanted
    sampled_positions: NDArray[np.int64]  # [S] place in its sequence of each token to be sampled
    sampled_rows: NDArray[np.int64]  # [S] stable row of each
    sampled_index: tuple[int, ...]  # [S] batch row of each
    scored_tokens: NDArray[np.int64]  # [P] places in the batch whose logits are wanted, row after row
    scored: tuple[Scored, ...]  # whose they are: P in all
    evidence: StepEvidence


def build_batch(
    step: int,
    rows: Rows[ScheduledRow],
    block_size: int,
    state_of: Callable[[int], SamplingState],
    num_blocks_free: int = -1,
) -> Batch:
    """Every row's tokens num_computed..num_computed + num_new. A row samples when nothing of it is left to compute. Its
    prompt's places are scored as they are computed, each once.

    ``state_of`` tells what lies in a stable row."""
    num_new = np.array([row.num_new_tokens for row in rows], dtype=np.int32)
    starts = np.array([row.sequence.num_computed_tokens for row in rows], dtype=np.int32)
    cu_seqlens = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(num_new, out=cu_seqlens[1:])
    block_tables = np.full((len(rows), max(len(row.sequence.block_ids) for row in rows)), -1, dtype=np.int32)
    token_ids = np.empty(cu_seqlens[-1], dtype=np.int64)
    scored_tokens: list[int] = []
    scored: list[Scored] = []
    for index, row in enumerate(rows):
        sequence, first, end = row.sequence, int(starts[index]), int(starts[index]) + row.num_new_tokens
        block_tables[index, : len(sequence.block_ids)] = sequence.block_ids
        tokens = slice(cu_seqlens[index], cu_seqlens[index + 1])
        token_ids[tokens] = sequence.token_ids[first:end]
        if sequence.num_unscored:
            assert first <= sequence.num_scored_tokens, f"{sequence.sequence_id}: a place of its prompt was passed over"
            places = range(sequence.num_scored_tokens, min(end, sequence.num_prompt_tokens - 1))
            scored_tokens += [int(cu_seqlens[index]) + place - first for place in places]
            scored.append(Scored(index, sequence.row, tuple(sequence.token_ids[place + 1] for place in places)))
    positions = np.arange(len(token_ids), dtype=np.int64) + np.repeat(starts - cu_seqlens[:-1], num_new)
    blocks = block_tables[np.repeat(np.arange(len(rows)), num_new), positions // block_size]
    slot_mapping = blocks.astype(np.int64) * block_size + positions % block_size
    kv_lens = starts + num_new
    sampled = tuple(index for index, row in enumerate(rows) if kv_lens[index] == row.sequence.num_tokens)
    at = np.array(sampled, dtype=np.int64)
    sampled_tokens = cu_seqlens[1:][at].astype(np.int64) - 1
    sampled_positions = kv_lens[at].astype(np.int64)
    sampled_rows = np.array([rows[index].sequence.row for index in sampled], dtype=np.int64)
    scored_places = np.array(scored_tokens, dtype=np.int64)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        sampled_tokens=sampled_tokens,
        sampled_positions=sampled_positions,
        sampled_rows=sampled_rows,
        sampled_index=sampled,
        scored_tokens=scored_places,
        scored=tuple(scored),
        evidence=StepEvidence(
            step=step,
            sequence_ids=tuple(row.sequence.sequence_id for row in rows),
            domains=tuple(row.sequence.domain for row in rows),
            token_ids=token_ids,
            cu_seqlens=cu_seqlens,
            kv_lens=kv_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            sampled_tokens=sampled_tokens,
            sampled_positions=sampled_positions,
            sampled_rows=sampled_rows,
            sampled_index=sampled,
            sampling=tuple(state_of(row) for row in sampled_rows.tolist()),
            positions=positions,
            scored_tokens=scored_places,
            scored=tuple(scored),
            num_blocks_free=num_blocks_free,
        ),
    )


def refused(error: OwnershipError, batch: Batch) -> Violation:
    """What a kernel refused, in the observer's words. Names everyone where the kernel named nobody, or a row that is
    nobody's."""
    evidence = batch.evidence
    rows = np.unique(np.searchsorted(evidence.cu_seqlens, np.array(error.tokens, dtype=np.int64), side="right") - 1)
    num_rows = len(evidence.sequence_ids)
    rows = rows if len(rows) and (rows < num_rows).all() else np.arange(num_rows)
    names = tuple(evidence.sequence_ids[row] for row in rows)
    domains = tuple(dict.fromkeys(evidence.domains[row] for row in rows))
    return ("kernel_ownership", names, domains, error.block_id, str(error))
