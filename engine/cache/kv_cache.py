"""The memory behind the blocks: for each layer one tensor of keys and one of values, [num_blocks, block_size, Hkv,
D], where Hkv and D may differ from layer to layer, and for each block the tag of the domain whose numbers lie in it.

The tags belong to the kernels' own check, which shares nothing with the pool that hands out the blocks: a block gets
its writer's tag with its first write, loses it when it is scrubbed, and is neither read nor written for anyone else.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.cache.device_words import DeviceWords, word_width
from engine.events import Words
from engine.models.facts import CacheLayer
from kernels.backend import DeviceBackend, KernelError, OwnershipError
from kernels.cpu.blocks import digest_blocks, fill_blocks
from kernels.cpu.library import Library, load
from kernels.memory import zeros

CPU = torch.device("cpu")
NUM_TAGS_KEPT = 4096  # domains whose tag is remembered; the others' are computed again


def block_bytes(layers: Sequence[CacheLayer], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values."""
    return 2 * block_size * dtype.itemsize * sum(layer.num_kv_heads * layer.head_size for layer in layers)


@lru_cache(maxsize=NUM_TAGS_KEPT)
def domain_tag(domain: str) -> int:
    """The number of a domain, never 0."""
    return int.from_bytes(hashlib.blake2b(domain.encode(), digest_size=8).digest(), "little", signed=True) | 1


def row_tags(domains: Sequence[str]) -> NDArray[np.int64]:
    return np.array([domain_tag(domain) for domain in domains], dtype=np.int64)


class KVCache:
    """Zeroed at the start; every later zero comes from `scrub`. ``kept_by``: whose device the memory lies on; its
    kernels keep tags of their own."""

    def __init__(
        self,
        *,
        layers: Sequence[CacheLayer],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
        kept_by: DeviceBackend | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Layers of one shape share one tensor [layers, 2, N, block_size, Hkv, D]: most models have one shape.
        counts = Counter(layers)
        self._memory = {
            shape: _zeros((count, 2, num_blocks, block_size, shape.num_kv_heads, shape.head_size), dtype, device)
            for shape, count in counts.items()
        }
        self._layers: list[tuple[Tensor, Tensor]] = []
        for layer in reversed(layers):
            counts[layer] -= 1
            keys, values = self._memory[layer][counts[layer]]
            self._layers.insert(0, (keys, values))
        self.block_tags = np.zeros(num_blocks, dtype=np.int64)  # 0: nobody's
        self._kept_by = kept_by
        self.device_tags = None if kept_by is None else kept_by.new_tags(num_blocks)
        self._library = _library() if device.type == "cpu" else None
        self._flat = [_Flat(memory, num_blocks) for memory in self._memory.values()]

    def claim(self, slot_mapping: NDArray[np.int64], token_tags: NDArray[np.int64]) -> None:
        """Tag the blocks of slots that are about to be written. Raises OwnershipError where they are somebody else's
        or not there."""
        blocks = slot_mapping // self.block_size
        _refuse((blocks < 0) | (blocks >= self.num_blocks), blocks, "a row would write beyond the cache")
        owners = self.block_tags[blocks]
        foreign = (owners != 0) & (owners != token_tags)
        _refuse(foreign, blocks, "a row would write into a block of another owner")
        self.block_tags[blocks] = token_tags
        twice = blocks[self.block_tags[blocks] != token_tags]
        _refuse(np.isin(blocks, twice), blocks, "two owners would write into one block")

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Views of a layer's keys and values."""
        return self._layers[index]

    def words(self) -> tuple[Words, ...]:
        """The cache itself as unsigned integers [places, num_blocks, block_size, words], one view for each shape of
        layers; a place is a layer's keys or values."""
        return tuple(_words(memory) for memory in self._memory.values())

    def digester(self) -> Callable[[int, tuple[int, int]], NDArray[np.int64]] | None:
        """What makes the 128-bit digest [2] of a block under a key: of every byte in all layers. None where the native
        library cannot be had, or the cache lies on a GPU."""
        library = self._library
        if library is None:
            return None

        def digest(block_id: int, key: tuple[int, int]) -> NDArray[np.int64]:
            at = self._checked([block_id])
            told = np.concatenate(
                [digest_blocks(library, one.keys, one.values, one.places(at), key).numpy() for one in self._flat]
            )
            factors = 2 * np.arange(len(told), dtype=np.int64) + 1  # odd: each layer's digest counts, and its place
            digests: NDArray[np.int64] = (told * factors[:, None]).sum(axis=0, dtype=np.int64)
            return digests

        return digest

    def scrub(self, block_ids: list[int]) -> None:
        """Overwrite blocks with zeros, in every layer. Raises IndexError for a block that is not there: then none is
        touched."""
        at = self._checked(block_ids)
        if self._kept_by is not None and self.device_tags is not None:
            self._kept_by.scrub(tuple(self._memory.values()), self.device_tags, block_ids)
        else:
            self._fill_with_zeros(block_ids, at)
        self.block_tags[block_ids] = 0

    def _fill_with_zeros(self, block_ids: list[int], at: Tensor) -> None:
        for one in self._flat:
            if self._library is None:
                one.memory[:, :, block_ids] = 0
            else:
                fill_blocks(self._library, one.keys, one.values, one.places(at), 0)

    def _checked(self, block_ids: list[int]) -> Tensor:
        """int64 [B]. A number beyond the last block is a place of another layer."""
        if block_ids and not (min(block_ids) >= 0 and max(block_ids) < self.num_blocks):
            raise IndexError(f"blocks are numbered from 0 to {self.num_blocks - 1}, not {block_ids}")
        return torch.tensor(block_ids, dtype=torch.int64)

    def is_zero(self, block_id: int) -> bool:
        return not any(bool(memory[:, :, block_id].any()) for memory in self._memory.values())


class _Flat:
    """Layers of one shape as the ops on whole blocks take them: keys of a layer, its values, the next layer's keys,
    one block after the other."""

    def __init__(self, memory: Tensor, num_blocks: int) -> None:
        self.memory = memory
        blocks = memory.flatten(0, 2)
        self.keys, self.values = blocks[:-num_blocks], blocks[num_blocks:]
        self._firsts = torch.arange(0, len(blocks), max(1, 2 * num_blocks))[:, None]  # of each layer

    def places(self, block_ids: Tensor) -> Tensor:
        """int64 [B] -> [layers * B], layer by layer."""
        return (self._firsts + block_ids).flatten()


def _library() -> Library | None:
    try:
        return load()
    except KernelError:
        return None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


def _words(memory: Tensor) -> Words:
    if memory.device.type != "cpu":
        return DeviceWords(memory)
    places = memory.flatten(0, 1).flatten(3).view(torch.uint8)
    words: NDArray[Any] = places.numpy().view(f"u{word_width(places.shape[3])}")
    return words


def _refuse(tokens: NDArray[np.bool_], blocks: NDArray[np.int64], message: str) -> None:
    if tokens.any():
        raise OwnershipError(message, np.flatnonzero(tokens).tolist(), int(blocks[tokens][0]))
