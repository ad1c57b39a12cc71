"""Whole blocks as bytes: their digest, and filling them. Integers only: the same on every instruction set."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu.library import BlocksArgs, Library, pointer


def digest_blocks(
    library: Library, key_cache: Tensor, value_cache: Tensor, block_ids: Tensor, key: tuple[int, int]
) -> Tensor:
    """See reference.digest_blocks, where its definition is. Raises IndexError for a block that is not there."""
    digests = torch.empty((len(block_ids), 2), dtype=torch.int64)
    args = _args(key_cache, value_cache, block_ids)
    args.digests = pointer(digests)
    args.key[0], args.key[1] = key
    library.digest_blocks(ctypes.byref(args))
    return digests


def fill_blocks(library: Library, key_cache: Tensor, value_cache: Tensor, block_ids: Tensor, byte: int) -> None:
    """See reference.fill_blocks. Raises IndexError for a block that is not there: then none is touched."""
    assert 0 <= byte < 256
    args = _args(key_cache, value_cache, block_ids)
    args.fill = byte
    library.fill_blocks(ctypes.byref(args))


def _args(key_cache: Tensor, value_cache: Tensor, block_ids: Tensor) -> BlocksArgs:
    assert key_cache.shape == value_cache.shape
    assert key_cache.dtype == value_cache.dtype
    assert block_ids.dtype == torch.int64
    num_blocks = len(key_cache)
    if len(block_ids) and not (int(block_ids.min()) >= 0 and int(block_ids.max()) < num_blocks):
        raise IndexError(f"blocks are numbered from 0 to {num_blocks - 1}")
    return BlocksArgs(
        keys=pointer(key_cache),
        values=pointer(value_cache),
        block_ids=pointer(block_ids),
        num_blocks=num_blocks,
        num_ids=len(block_ids),
        block_bytes=key_cache[0].numel() * key_cache.element_size() if num_blocks else 0,
    )
