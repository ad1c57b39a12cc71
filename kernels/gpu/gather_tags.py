"""The owners of the blocks that a step's rows will read, from the very arrays that the kernels get: what an auditor on
the host compares with its own book.

    out[r, b] = block_tags[block_tables[r, b]]     for b below row r's number of blocks, else 0; -1 where out of range

Twin: reference.gather_tags.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import check, options

BLOCK = 256  # table entries of one program


@triton.jit
def gather_tags_kernel(
    block_tables_ptr,  # int32 [R, table_width]
    kv_lens_ptr,  # int32 [R]
    block_tags_ptr,  # int64 [N]
    out_ptr,  # int64 [R, table_width]
    num_blocks,
    table_width,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_read = entry < tl.cdiv(tl.load(kv_lens_ptr + row), BLOCK_SIZE)
    block = tl.load(block_tables_ptr + row * table_width + entry, mask=is_read & (entry < table_width), other=-1)
    is_there = (block >= 0) & (block < num_blocks)
    tag = tl.load(block_tags_ptr + block, mask=is_read & is_there, other=-1)
    tag = tl.where(is_read, tag, 0)
    tl.store(out_ptr + row * table_width + entry, tag, mask=entry < table_width)


def gather_tags(block_tables: Tensor, kv_lens: Tensor, block_tags: Tensor, block_size: int) -> Tensor:
    """block_tables int32 [R, B], kv_lens int32 [R], block_tags int64 [N] -> int64 [R, B]."""
    num_rows, width = block_tables.shape
    check(block_tables, (num_rows, width))
    check(kv_lens, (num_rows,), block_tables)
    out = torch.empty((num_rows, width), dtype=torch.int64, device=block_tables.device)
    if num_rows and width:
        gather_tags_kernel[(num_rows, triton.cdiv(width, BLOCK))](
            block_tables,
            kv_lens,
            block_tags,
            out,
            len(block_tags),
            width,
            BLOCK_SIZE=block_size,
            BLOCK=BLOCK,
            **options(),
        )
    return out
