"""One step as arrays: built once, shown to the auditor, then read by the kernels. The same memory, no copies, no
context objects."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.events import StepEvidence
from engine.scheduler import ScheduledRow


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens in R rows; S of the rows get a new token."""

    token_ids: NDArray[np.int64]  # [T] the same array as the evidence's
    positions: NDArray[np.int64]  # [T] place of each token in its sequence
    sampled_tokens: NDArray[np.int64]  # [S] places in the batch whose logits are wanted
    sampled_positions: NDArray[np.int64]  # [S] place in its sequence of each token to be sampled
    sampled_rows: NDArray[np.int64]  # [S] stable row of each
    sampled_index: tuple[int, ...]  # [S] batch row of each
    evidence: StepEvidence


def build_batch(step: int, rows: Rows[ScheduledRow], block_size: int) -> Batch:
    """Every row's tokens num_computed..num_computed + num_new. A row samples when nothing of it is left to compute."""
    num_new = np.array([row.num_new_tokens for row in rows], dtype=np.int32)
    starts = np.array([row.sequence.num_computed_tokens for row in rows], dtype=np.int32)
    cu_seqlens = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(num_new, out=cu_seqlens[1:])
    block_tables = np.full((len(rows), max(len(row.sequence.block_ids) for row in rows)), -1, dtype=np.int32)
    token_ids = np.empty(cu_seqlens[-1], dtype=np.int64)
    positions = np.empty(cu_seqlens[-1], dtype=np.int64)
    slot_mapping = np.empty(cu_seqlens[-1], dtype=np.int64)
    for index, row in enumerate(rows):
        sequence, first, end = row.sequence, int(starts[index]), int(starts[index]) + row.num_new_tokens
        block_tables[index, : len(sequence.block_ids)] = sequence.block_ids
        tokens = slice(cu_seqlens[index], cu_seqlens[index + 1])
        token_ids[tokens] = sequence.token_ids[first:end]
        positions[tokens] = np.arange(first, end)
        slot_mapping[tokens] = (
            block_tables[index, positions[tokens] // block_size].astype(np.int64) * block_size
            + positions[tokens] % block_size
        )
    kv_lens = starts + num_new
    sampled = [index for index, row in enumerate(rows) if kv_lens[index] == row.sequence.num_tokens]
    return Batch(
        token_ids=token_ids,
        positions=positions,
        sampled_tokens=cu_seqlens[1:][sampled].astype(np.int64) - 1,
        sampled_positions=kv_lens[sampled].astype(np.int64),
        sampled_rows=np.array([rows[index].sequence.row for index in sampled], dtype=np.int64),
        sampled_index=tuple(sampled),
        evidence=StepEvidence(
            step=step,
            sequence_ids=tuple(row.sequence.sequence_id for row in rows),
            domains=tuple(row.sequence.domain for row in rows),
            token_ids=token_ids,
            cu_seqlens=cu_seqlens,
            kv_lens=kv_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
        ),
    )
