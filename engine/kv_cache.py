"""The memory behind the blocks: for each layer one tensor of keys and one of values, [num_blocks, block_size, Hkv,
D], and for each block the tag of the domain whose numbers lie in it.

The tags belong to the kernels' own check, which shares nothing with the pool that hands out the blocks: a block gets
its writer's tag with its first write, loses it when it is scrubbed, and is neither read nor written for anyone else.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import OwnershipError

NUM_TAGS_KEPT = 4096  # domains whose tag is remembered; the others' are computed again


def block_bytes(num_layers: int, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values."""
    return 2 * num_layers * block_size * num_kv_heads * head_size * dtype.itemsize


@lru_cache(maxsize=NUM_TAGS_KEPT)
def domain_tag(domain: str) -> int:
    """The number of a domain, never 0."""
    return int.from_bytes(hashlib.blake2b(domain.encode(), digest_size=8).digest(), "little", signed=True) | 1


def row_tags(domains: Sequence[str]) -> NDArray[np.int64]:
    return np.array([domain_tag(domain) for domain in domains], dtype=np.int64)


class KVCache:
    """Zeroed at the start; every later zero comes from `scrub`."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._memory = torch.zeros((num_layers, 2, num_blocks, block_size, num_kv_heads, head_size), dtype=dtype)

        self.block_tags = np.zeros(num_blocks, dtype=np.int64)  # 0: nobody's

    def claim(self, slot_mapping: NDArray[np.int64], token_tags: NDArray[np.int64]) -> None:
        """Tag the blocks of slots that are about to be written. Raises OwnershipError where they are somebody else's
        or not there."""
        blocks = slot_mapping // self.block_size
        if ((blocks < 0) | (blocks >= self.num_blocks)).any():
            raise OwnershipError("a row would write beyond the cache")
        owners = self.block_tags[blocks]
        if ((owners != 0) & (owners != token_tags)).any():
            raise OwnershipError("a row would write into a block of another owner")
        self.block_tags[blocks] = token_tags
        if (self.block_tags[blocks] != token_tags).any():
            raise OwnershipError("two owners would write into one block")

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Views of a layer's keys and values."""
        return self._memory[index, 0], self._memory[index, 1]

    def scrub(self, block_ids: list[int]) -> None:
        """Overwrite blocks with zeros, in every layer."""
        self._memory[:, :, block_ids] = 0
        self.block_tags[block_ids] = 0

    def is_zero(self, block_id: int) -> bool:
        return not bool(self._memory[:, :, block_id].any())
