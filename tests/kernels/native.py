"""Steps for the native kernels: rows with a past in a scattered cache, new tokens, and what the twins say."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.backend import KernelError, StepTables
from kernels.cpu.backend import NativeBackend, Plan
from kernels.cpu.library import load


def isas() -> list[str]:
    try:
        return list(load().isas())
    except KernelError:
        return []


every_isa = pytest.mark.parametrize(
    "isa",
    isas()
    or [pytest.param("", marks=pytest.mark.skip(reason="no native kernels: install a C++ compiler, run make native"))],
)


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Row:
    """A whole sequence's projections: what it asks, and what it puts into the cache, at each position."""

    qkv: Tensor  # [length, Hq + 2 * Hkv, D]

    @property
    def length(self) -> int:
        return len(self.qkv)


@dataclass
class Step:
    qkv: Tensor
    cos: Tensor
    sin: Tensor
    key_cache: Tensor
    value_cache: Tensor
    tables: StepTables


def random_row(shape: Shape, length: int, seed: int) -> Row:
    generator = torch.Generator().manual_seed(seed)
    heads = shape.num_heads + 2 * shape.num_kv_heads
    return Row(torch.randn((length, heads, shape.head_size), generator=generator).to(shape.dtype))


def angles(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    turned = positions.float()[:, None] * torch.linspace(1.0, 0.01, shape.head_size // 2)[None, :]
    return turned.cos(), turned.sin()


def make_step(
    shape: Shape, rows: list[Row], parts: list[tuple[int, int]], seed: int = 0, *, rotate: bool = True
) -> Step:
    """Compute positions first..end of each row; what lies before is in the cache, all else there is NaN. ``rotate``
    False: the rows' keys are rotated already."""
    order = np.random.default_rng(seed)
    num_blocks = [-(-end // shape.block_size) for _, end in parts]
    free = order.permutation(sum(num_blocks) + 2).tolist()
    cache_shape = (len(free), shape.block_size, shape.num_kv_heads, shape.head_size)
    key_cache, value_cache = (torch.full(cache_shape, math.nan, dtype=shape.dtype) for _ in range(2))
    block_tables = np.full((len(rows), max([*num_blocks, 0]) + 1), -1, dtype=np.int32)
    block_tags = np.zeros(len(free), dtype=np.int64)
    slots, asked, positions = [], [], []
    value_start = shape.num_heads + shape.num_kv_heads
    for index, (row, (first, end)) in enumerate(zip(rows, parts, strict=True)):
        blocks = np.array([free.pop() for _ in range(num_blocks[index])], dtype=np.int64)
        block_tables[index, : len(blocks)] = blocks
        block_tags[blocks] = index + 1
        at = np.arange(end)
        row_slots = torch.from_numpy(blocks[at // shape.block_size] * shape.block_size + at % shape.block_size)
        cos, sin = angles(shape, torch.arange(first))
        past = row.qkv[:first]
        key = past[:, shape.num_heads : value_start]
        if rotate:
            key = reference.rope(key, cos, sin)
        reference.store_kv(key, past[:, value_start:], key_cache, value_cache, row_slots[:first])
        slots.append(row_slots[first:])
        asked.append(row.qkv[first:end])
        positions.append(torch.arange(first, end))
    cos, sin = angles(shape, torch.cat(positions))
    num_new = [end - first for first, end in parts]
    return Step(
        torch.cat(asked),
        cos,
        sin,
        key_cache,
        value_cache,
        StepTables(
            cu_seqlens=np.cumsum([0, *num_new]).astype(np.int32),
            kv_lens=np.array([end for _, end in parts], dtype=np.int32),
            block_tables=block_tables,
            slot_mapping=torch.cat(slots).numpy(),
            row_tags=np.arange(1, len(rows) + 1, dtype=np.int64),
            block_tags=block_tags,
            block_size=shape.block_size,
        ),
    )


@dataclass(frozen=True)
class Features:
    """What a model may want of attention beside the plain thing."""

    window: int = 0
    soft_cap: float = 0.0
    sinks: Tensor | None = None
    rotate: bool = True  # False: queries and keys come already rotated


PLAIN = Features()


def run(backend: NativeBackend, shape: Shape, step: Step, *, check: bool = True, features: Features = PLAIN) -> Tensor:
    plan = backend.plan(step.tables)
    out = attend(backend, shape, step, plan, features)
    if check:
        backend.check(plan)
    return out


def attend(backend: NativeBackend, shape: Shape, step: Step, plan: Plan, features: Features = PLAIN) -> Tensor:
    return backend.attend(
        step.qkv.clone(),
        step.cos if features.rotate else None,
        step.sin if features.rotate else None,
        step.key_cache,
        step.value_cache,
        num_heads=shape.num_heads,
        plan=plan,
        scale=shape.head_size**-0.5,
        window=features.window,
        soft_cap=features.soft_cap,
        sinks=features.sinks,
    )


def expected(shape: Shape, step: Step) -> Tensor:
    """The twins, on the same step: fills its caches, too."""
    value_start = shape.num_heads + shape.num_kv_heads
    rotated = reference.rope(step.qkv[:, :value_start], step.cos, step.sin)
    reference.store_kv(
        rotated[:, shape.num_heads :],
        step.qkv[:, value_start:],
        step.key_cache,
        step.value_cache,
        torch.from_numpy(step.tables.slot_mapping),
    )
    return reference.paged_attention(
        rotated[:, : shape.num_heads],
        step.key_cache,
        step.value_cache,
        cu_seqlens=torch.from_numpy(step.tables.cu_seqlens),
        kv_lens=torch.from_numpy(step.tables.kv_lens),
        block_tables=torch.from_numpy(step.tables.block_tables),
        scale=shape.head_size**-0.5,
    )


def with_tables(step: Step, **changes: object) -> Step:
    return replace(step, tables=replace(step.tables, **changes))  # type: ignore[arg-type]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
