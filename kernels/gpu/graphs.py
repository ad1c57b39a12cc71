"""Batches of decode tokens as CUDA graphs: one launch of the whole step for a batch of one of a few sizes.

A graph launches fixed kernels on fixed memory. So each size has arrays of its own, on the device, that its kernels
read; a step is copied into them, filled up to the size (kernels/padding.py), every element of them each time:
nothing of an earlier batch is left. The number of splits of a row is fixed as well, SPLITS_MAX; what a shorter row does
not have ends at once and changes no bit, and a batch with a longer row is launched as any other.

A graph cannot wait, so nothing asks within it what the kernels refused. Its first launch clears the flags, and `run`
reads them behind its last, before anyone gets the logits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import PADDING_SLOT, Launched, StepTables, check_tables
from kernels.gpu.attention import AttentionPlan
from kernels.gpu.capture import Capture, Compute
from kernels.gpu.launch import NO_BLOCK
from kernels.gpu.plan import Plan, raise_refused
from kernels.padding import NOBODY, pad, padded_size

SPLITS_MAX = 16  # of a row: with splits of 512, 8192 keys. A program that has none costs little, a hundred thousand do
ALIGNMENT = 256  # bytes: kernels are compiled for pointers that a power of two divides

Forward = Callable[[Tensor, Tensor, Plan, Tensor], Tensor]  # token ids, positions, plan, wanted -> logits


class DecodeGraphs:
    """``forward`` computes a step and gives logits float32 [S, V] of the wanted tokens; ``device_tags`` int64 [N] is
    the device's book of owners. Captures all sizes now."""

    def __init__(
        self,
        forward: Forward,
        sizes: Sequence[int],
        *,
        device_tags: Tensor,
        block_size: int,
        context_max: int,
        split: int,
        capture: Capture,
    ) -> None:
        self.sizes = tuple(sorted(set(sizes)))
        self._num_splits = min(SPLITS_MAX, -(-context_max // split))
        self._keys_max = min(context_max, self._num_splits * split)
        self._width = -(-self._keys_max // block_size)
        make = partial(
            _Graph,
            width=self._width,
            num_splits=self._num_splits,
            device_tags=device_tags,
            block_size=block_size,
            split=split,
        )
        # The largest first: the others' numbers find room in its memory.
        self._graphs = {size: make(forward, size, capture=capture) for size in reversed(self.sizes)}

    def fits(self, tables: StepTables) -> bool:
        """Whether there is a graph for these rows: decode tokens alone, not too many and none too long."""
        num_rows, width = tables.block_tables.shape
        return (
            0 < num_rows <= self.sizes[-1]
            and padded_size(tables, self.sizes) in self._graphs
            and width <= self._width
            and int(tables.kv_lens.max()) <= self._keys_max
            and bool((np.diff(tables.cu_seqlens) == 1).all())
        )

    def run(self, tables: StepTables, token_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Launched:
        """Rows that `fits` said yes to; token_ids, positions [R]. Raises OwnershipError, ValueError on tables that
        cannot be. The logits are overwritten by the next run."""
        check_tables(tables)
        return self._graphs[padded_size(tables, self.sizes)].run(tables, token_ids, positions)


class _Inputs:
    """Arrays of ``size`` rows: one piece of memory on the host, which is written, and one on the device, which gets
    its copy."""

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        shapes = {
            "token_ids": ((size,), torch.int64, 0),
            "positions": ((size,), torch.int64, 0),
            "slot_mapping": ((size,), torch.int64, PADDING_SLOT),
            "row_tags": ((size,), torch.int64, NOBODY),
            "kv_lens": ((size,), torch.int32, 0),
            "merge_tokens": ((size,), torch.int32, -1),
            "block_tables": ((size, width), torch.int32, -1),
        }
        starts, end = {}, 0
        for name, (shape, dtype, _) in shapes.items():
            starts[name] = end
            end += -(-int(np.prod(shape)) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)
        self.host: dict[str, NDArray[Any]] = {}
        self.device: dict[str, Tensor] = {}
        for name, (shape, dtype, nothing) in shapes.items():
            part = slice(starts[name], starts[name] + int(np.prod(shape)) * dtype.itemsize)
            self.host[name] = self._host[part].view(dtype).view(shape).numpy()
            self.device[name] = self._device[part].view(dtype).view(shape)
            self.host[name][...] = nothing
        self.send()

    def send(self) -> None:
        """In one copy. The host's memory may be written again when the device was waited for."""
        self._device.copy_(self._host, non_blocking=True)


class _Graph:
    """One size. Before its first step its rows are all padding: a capture reads and writes no block."""

    def __init__(
        self,
        forward: Forward,
        size: int,
        *,
        width: int,
        num_splits: int,
        device_tags: Tensor,
        block_size: int,
        split: int,
        capture: Capture,
    ) -> None:
        device = device_tags.device
        self._size, self._split = size, split
        self._cu_seqlens = np.arange(size + 1, dtype=np.int32)
        self._inputs = _Inputs(size, width, device)
        given = self._inputs.device
        flags = torch.full((2, size), NO_BLOCK, dtype=torch.int32, device=device)
        starts = torch.arange(size, dtype=torch.int64, device=device) * num_splits
        attention = AttentionPlan(
            cu_seqlens=torch.from_numpy(self._cu_seqlens).to(device),
            kv_lens=given["kv_lens"],
            block_tables=given["block_tables"],
            row_tags=given["row_tags"],
            block_tags=device_tags,
            partial_starts=starts,
            merge_tokens=given["merge_tokens"],
            merge_places=starts,
            merge_ends=given["kv_lens"],
            num_partials=size * num_splits,
            num_splits_max=num_splits,
            refused=flags[0],
            block_size=block_size,
            split=split,
        )
        self.plan = plan = Plan(None, attention, given["slot_mapping"], given["row_tags"], flags[1])
        wanted = torch.arange(size, dtype=torch.int64, device=device)

        def compute() -> Tensor:
            flags.fill_(NO_BLOCK)
            return forward(given["token_ids"], given["positions"], plan, wanted)

        self._replay: Compute = capture(compute)

    def run(self, tables: StepTables, token_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Launched:
        num_rows, missing = len(tables.kv_lens), self._size - len(tables.kv_lens)
        filled, width = pad(tables, self._size), tables.block_tables.shape[1]
        given = self._inputs.host
        given["token_ids"][...] = np.pad(token_ids, (0, missing))
        given["positions"][...] = np.pad(positions, (0, missing))
        given["slot_mapping"][...] = filled.slot_mapping
        given["row_tags"][...] = filled.row_tags
        given["kv_lens"][...] = filled.kv_lens
        given["merge_tokens"][...] = np.where(filled.kv_lens > self._split, self._cu_seqlens[:-1], -1)
        given["block_tables"][:, :width] = filled.block_tables
        given["block_tables"][:, width:] = -1
        self._inputs.send()
        logits = self._replay()
        held = StepTables(
            cu_seqlens=self._cu_seqlens,
            kv_lens=given["kv_lens"],
            block_tables=given["block_tables"][:, :width],
            slot_mapping=given["slot_mapping"],
            row_tags=given["row_tags"],
            block_tags=tables.block_tags,
            block_size=tables.block_size,
            device_tags=tables.device_tags,
        )
        raise_refused(self.plan, held)
        return Launched(logits[:num_rows], given["token_ids"], given["positions"], held)
