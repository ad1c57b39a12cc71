"""Memory for numbers that live long: weights and the KV cache. It is asked for in huge pages, which spare the
processor most of its page walks; where the system has none to give, or none of that name, it is ordinary memory.
"""

import mmap
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes
ALIGNMENT = 64  # bytes: a cache line


def anonymous(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] of zeros, beginning at a huge page's border. Pages are taken when they are first written."""
    # Private: shared anonymous memory, Python's default, belongs to a file system of its own, whose huge pages are
    # off nearly everywhere.
    mapped = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # another system, or a container that forbids it
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)  # keeps the mapping alive
    start = -memory.data_ptr() % HUGE_PAGE
    return memory[start : start + num_bytes]


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return anonymous(max(1, prod(shape)) * dtype.itemsize)[: prod(shape) * dtype.itemsize].view(dtype).view(shape)


class Arena:
    """Hands out pieces of larger mappings one after the other, so that small matrices share huge pages. A mapping is
    given back when the last of its pieces is gone."""

    def __init__(self, mapping_bytes: int = 32 * HUGE_PAGE) -> None:
        self._mapping_bytes = mapping_bytes
        self._rest = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = prod(shape) * dtype.itemsize
        taken = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if taken > len(self._rest):
            self._rest = anonymous(max(self._mapping_bytes, taken))
        piece, self._rest = self._rest[:num_bytes], self._rest[taken:]
        return piece.view(dtype).view(shape)
