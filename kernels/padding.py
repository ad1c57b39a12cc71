"""Batches of decode tokens filled up to one of a few sizes: what a CUDA graph wants, whose launches cannot change.

A row that fills up has one token and not a single key: attention reads nothing for it and gives zeros, the write into
the cache skips it, and its owner is nobody. No block is touched for it, so none has to be set aside. Rows do not depend
on each other, so the others keep their bits.
"""

from collections.abc import Sequence

import numpy as np

from kernels.backend import PADDING_SLOT, StepTables

NOBODY = 0


def padded_size(tables: StepTables, sizes: Sequence[int]) -> int:
    """The least of ``sizes`` that holds these rows; their own number where they are not all decode tokens, or more than
    any size."""
    num_rows = len(tables.kv_lens)
    if not (np.diff(tables.cu_seqlens) == 1).all():
        return num_rows
    return min((size for size in sizes if size >= num_rows), default=num_rows)


def pad(tables: StepTables, size: int) -> StepTables:
    """The same rows first, then as many more as are missing to ``size``."""
    missing = size - len(tables.kv_lens)
    assert missing >= 0
    if not missing:
        return tables
    last = int(tables.cu_seqlens[-1])
    return StepTables(
        cu_seqlens=np.concatenate((tables.cu_seqlens, np.arange(last + 1, last + missing + 1, dtype=np.int32))),
        kv_lens=np.pad(tables.kv_lens, (0, missing)),
        block_tables=np.pad(tables.block_tables, ((0, missing), (0, 0)), constant_values=-1),
        slot_mapping=np.pad(tables.slot_mapping, (0, missing), constant_values=PADDING_SLOT),
        row_tags=np.pad(tables.row_tags, (0, missing), constant_values=NOBODY),
        block_tags=tables.block_tags,
        block_size=tables.block_size,
        device_tags=tables.device_tags,
    )
