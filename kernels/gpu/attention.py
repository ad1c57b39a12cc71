"""From a step's tables to launches of paged_attention: what goes to the device once a step, then a call a layer."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import StepTables
from kernels.gpu.launch import NO_BLOCK, SPLIT, check, is_interpreted, options, power_of_two
from kernels.gpu.launch_table import AttentionShape
from kernels.gpu.paged_attention import merge_kernel, paged_attention_kernel


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The arrays of one step on the device, and what the kernels refused."""

    cu_seqlens: Tensor  # int32 [R + 1]
    kv_lens: Tensor  # int32 [R]
    block_tables: Tensor  # int32 [R, B]
    row_tags: Tensor  # int64 [R]
    block_tags: Tensor  # int64 [N]
    partial_starts: Tensor  # int64 [R]
    merge_tokens: Tensor  # int32 [M]
    merge_places: Tensor  # int64 [M]
    merge_ends: Tensor  # int32 [M]
    num_partials: int
    num_splits_max: int
    refused: Tensor  # int32 [R], out: NO_BLOCK, or a block that was not read
    block_size: int
    split: int


def plan_attention(tables: StepTables, device: torch.device, *, split: int = SPLIT) -> AttentionPlan:
    num_new = np.diff(tables.cu_seqlens)
    num_splits = np.where(num_new > 0, -(-tables.kv_lens.astype(np.int64) // split), 0)
    num_waiting = np.where(num_splits > 1, num_new, 0)  # tokens
    starts = np.cumsum(num_waiting * num_splits) - num_waiting * num_splits
    rows = np.repeat(np.arange(len(num_new)), num_waiting)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(num_waiting) - num_waiting, num_waiting)

    def put(array: NDArray[np.generic], dtype: type[np.generic] = np.int32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array.astype(dtype, copy=False))).to(device)

    return AttentionPlan(
        cu_seqlens=put(tables.cu_seqlens),
        kv_lens=put(tables.kv_lens),
        block_tables=put(tables.block_tables),
        row_tags=put(tables.row_tags, np.int64),
        block_tags=put(tables.block_tags, np.int64) if tables.device_tags is None else tables.device_tags,
        partial_starts=put(starts, np.int64),
        merge_tokens=put(tables.cu_seqlens[rows] + within),
        merge_places=put(starts[rows] + within * num_splits[rows], np.int64),
        merge_ends=put(tables.kv_lens[rows] - num_new[rows] + within + 1),
        num_partials=int((num_waiting * num_splits).sum()),
        num_splits_max=int(num_splits.max(initial=1)),
        refused=torch.full((len(num_new),), NO_BLOCK, dtype=torch.int32, device=device),
        block_size=tables.block_size,
        split=split,
    )


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    plan: AttentionPlan,
    shape: AttentionShape,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    check_owners: bool = True,
) -> Tensor:
    """query [T, Hq, D], a view of rows with a stride of their own is fine; caches [N, block_size, Hkv, D]; sinks
    float32 [Hq] -> [T, Hq, D]. See reference.paged_attention for the rule and paged_attention.py for the order.

    Caches of uint8 hold e4m3, in units of ``scales``, the keys' and the values', powers of two.

    ``check_owners`` False exists to measure what the check costs; block ids out of range are refused all the same.
    """
    num_tokens, num_heads, size = query.shape
    num_blocks, block_size, num_kv_heads, _ = key_cache.shape
    assert query.stride()[1:] == (size, 1)
    assert num_heads % num_kv_heads == 0
    assert block_size == plan.block_size
    for cache in (key_cache, value_cache):
        check(cache, (num_blocks, block_size, num_kv_heads, size), query)
        assert cache.dtype in (query.dtype, torch.uint8)
    check(plan.block_tags, (num_blocks,), query)
    if sinks is not None:
        check(sinks, (num_heads,), query)
    assert plan.split % shape.tile == 0
    ratio, num_rows = num_heads // num_kv_heads, len(plan.kv_lens)
    assert ratio <= shape.block_m
    out = torch.empty((num_tokens, num_heads, size), dtype=query.dtype, device=query.device)
    if not num_tokens:
        return out
    partial = torch.empty((plan.num_partials, num_heads, size), dtype=torch.float32, device=query.device)
    tops, totals = torch.empty((2, plan.num_partials, num_heads), dtype=torch.float32, device=query.device)
    num_programs = num_tokens // (shape.block_m // ratio) + num_rows
    paged_attention_kernel[(num_programs, num_kv_heads, plan.num_splits_max)](
        query,
        key_cache,
        value_cache,
        out,
        partial,
        tops,
        totals,
        plan.cu_seqlens,
        plan.kv_lens,
        plan.block_tables,
        plan.row_tags,
        plan.block_tags,
        plan.partial_starts,
        out if sinks is None else sinks,
        plan.refused,
        scale,
        *scales,
        soft_cap,
        window,
        num_rows,
        num_blocks,
        plan.block_tables.shape[1],
        query.stride(0),
        HKV=num_kv_heads,
        RATIO=ratio,
        D=size,
        D_PAD=max(16, power_of_two(size)),
        BLOCK_SIZE=block_size,
        BLOCK_M=shape.block_m,
        TILE=shape.tile,
        SPLIT=plan.split,
        HAS_WINDOW=window > 0,
        HAS_CAP=soft_cap > 0,
        HAS_SINKS=sinks is not None,
        FP8=key_cache.dtype == torch.uint8,
        CHECK=check_owners,
        CAST=is_interpreted(),
        **options(shape.num_warps, shape.num_stages),
    )
    if len(plan.merge_tokens):
        merge_kernel[(len(plan.merge_tokens), num_kv_heads)](
            out,
            partial,
            tops,
            totals,
            plan.merge_tokens,
            plan.merge_places,
            plan.merge_ends,
            out if sinks is None else sinks,
            HKV=num_kv_heads,
            RATIO=ratio,
            RATIO_PAD=power_of_two(ratio),
            D=size,
            D_PAD=max(16, power_of_two(size)),
            SPLIT=plan.split,
            HAS_SINKS=sinks is not None,
            **options(),
        )
    return out
