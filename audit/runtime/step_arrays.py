"""The arrays of one step, as the auditor is given them, and whether they fit together at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from audit.runtime.sampling_rows import SampledRow, ScoredRow


@dataclass(frozen=True, slots=True)
class StepArrays:
    """R rows, T tokens; shapes and types are not yet to be trusted."""

    sequence_ids: Sequence[str]
    domains: Sequence[str]
    token_ids: Any
    cu_seqlens: Any
    kv_lens: Any
    block_tables: Any
    slot_mapping: Any
    sampled: "Sequence[SampledRow] | None" = None  # None: how rows sample is not told, and not checked
    scored: "Sequence[ScoredRow]" = ()
    positions: Any = None  # None: not told
    num_blocks_free: int = -1  # by the engine's own count; -1: not told


def shape_problem(step: StepArrays) -> str | None:
    """What makes the arrays impossible to check, if anything."""
    num_rows = len(step.sequence_ids)
    arrays = {
        name: np.asarray(getattr(step, name))
        for name in ("token_ids", "cu_seqlens", "kv_lens", "block_tables", "slot_mapping")
    }
    for name, array in arrays.items():
        if array.dtype.kind not in "iu":
            return f"{name} has type {array.dtype}, not an integer type"
    cu, tables = arrays["cu_seqlens"], arrays["block_tables"]
    if len(step.domains) != num_rows:
        return f"{len(step.domains)} domains for {num_rows} rows"
    if cu.shape != (num_rows + 1,) or arrays["kv_lens"].shape != (num_rows,):
        return f"cu_seqlens {cu.shape} and kv_lens {arrays['kv_lens'].shape} do not fit {num_rows} rows"
    if tables.ndim != 2 or tables.shape[0] != num_rows or arrays["slot_mapping"].ndim != 1:
        return f"block_tables {tables.shape} or slot_mapping {arrays['slot_mapping'].shape} has the wrong shape"
    if arrays["token_ids"].shape != arrays["slot_mapping"].shape:
        return f"{arrays['token_ids'].shape} tokens for {arrays['slot_mapping'].shape} slots"
    if step.positions is not None and np.shape(step.positions) != arrays["token_ids"].shape:
        return f"{np.shape(step.positions)} positions for {arrays['token_ids'].shape} tokens"
    cu = cu.astype(np.int64)
    if cu[0] != 0 or (np.diff(cu) < 0).any() or cu[-1] != len(arrays["slot_mapping"]):
        return f"cu_seqlens must rise from 0 to {len(arrays['slot_mapping'])}, the number of slots"
    return None
