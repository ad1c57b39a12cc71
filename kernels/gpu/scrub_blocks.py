"""Zeros for blocks that leave their domain, in every layer, and nobody's tag on them.

The tag goes with the first layer's keys; a block is free for another domain when the launch is done. Ids out of range
are left alone. Twin: reference.scrub_blocks.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import check, options

BLOCK = 1024  # numbers of one program


@triton.jit
def scrub_blocks_kernel(
    memory_ptr,  # [parts, num_blocks, SIZE]
    blocks_ptr,  # int64 [B]
    block_tags_ptr,  # int64 [num_blocks]
    num_blocks,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.load(blocks_ptr + tl.program_id(0))
    part, piece = tl.program_id(1).to(tl.int64), tl.program_id(2)
    if (block >= 0) & (block < num_blocks):
        at = piece * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], dtype=memory_ptr.dtype.element_ty)
        tl.store(memory_ptr + (part * num_blocks + block) * SIZE + at, zeros, mask=at < SIZE)
        if (part == 0) & (piece == 0):
            tl.store(block_tags_ptr + block, 0)


def scrub_blocks(memory: Tensor, block_ids: Tensor, block_tags: Tensor) -> None:
    """memory [layers, 2, N, block_size, Hkv, D] of one shape of layers; block_ids int64 [B]; block_tags int64 [N]."""
    num_layers, two, num_blocks = memory.shape[:3]
    check(memory, tuple(memory.shape))
    check(block_tags, (num_blocks,), memory)
    check(block_ids, (len(block_ids),), memory)
    size = memory[0, 0, 0].numel()
    if len(block_ids):
        scrub_blocks_kernel[(len(block_ids), num_layers * two, triton.cdiv(size, BLOCK))](
            memory, block_ids, block_tags, num_blocks, SIZE=size, BLOCK=BLOCK, **options()
        )
