"""The memory behind the blocks: for each layer one tensor of keys and one of values, [num_blocks, block_size, Hkv,
D]."""

import torch
from torch import Tensor


def block_bytes(num_layers: int, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values."""
    return 2 * num_layers * block_size * num_kv_heads * head_size * dtype.itemsize


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

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Views of a layer's keys and values."""
        return self._memory[index, 0], self._memory[index, 1]

    def scrub(self, block_ids: list[int]) -> None:
        """Overwrite blocks with zeros, in every layer."""
        self._memory[:, :, block_ids] = 0

    def is_zero(self, block_id: int) -> bool:
        return not bool(self._memory[:, :, block_id].any())
