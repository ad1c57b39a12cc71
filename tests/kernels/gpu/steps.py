"""Steps for the Triton kernels: tests/kernels/native.py's, run on whatever there is, a GPU or the interpreter."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor

from kernels import reference
from kernels.backend import StepTables
from kernels.gpu import attention
from kernels.gpu.attention import AttentionPlan, plan_attention
from kernels.gpu.launch import NO_BLOCK, is_interpreted
from kernels.gpu.launch_table import AttentionShape
from kernels.gpu.rope_and_store_kv import rope_and_store_kv
from tests.kernels.gpu.interpreter import sum_in_order
from tests.kernels.native import PLAIN, Features, Shape, Step

sum_in_order()
DEVICE = torch.device("cpu" if is_interpreted() else "cuda")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SMALL = AttentionShape(block_m=16, tile=16, num_warps=4)
SPLIT = 32  # as short as tests want it: rows of 33 keys have two sums

# A program takes the interpreter ten milliseconds: fewer examples than elsewhere, deep runs have their own number.
few = settings(max_examples=max(10, settings.default.max_examples // 4), deadline=None)


@dataclass
class Result:
    out: Tensor
    plan: AttentionPlan
    key_cache: Tensor
    value_cache: Tensor
    block_tags: Tensor
    refused_tokens: list[int]
    refused_rows: list[int]
    launched: list[dict[str, Any]] = field(default_factory=list)


def run(
    shape: Shape,
    step: Step,
    *,
    features: Features = PLAIN,
    launch: AttentionShape = SMALL,
    split: int = SPLIT,
    scales: tuple[float, float] = (1.0, 1.0),
    check_owners: bool = True,
) -> Result:
    """Rope, store, attention, as a layer has them. The step stays as it was."""
    tables = step.tables
    plan = plan_attention(tables, DEVICE, split=split)
    qkv, key_cache, value_cache = (t.clone().to(DEVICE) for t in (step.qkv, step.key_cache, step.value_cache))
    block_tags = plan.block_tags.clone()
    refused = torch.full((len(qkv),), NO_BLOCK, dtype=torch.int32, device=DEVICE)
    rope_and_store_kv(
        qkv,
        step.cos.to(DEVICE) if features.rotate else None,
        step.sin.to(DEVICE) if features.rotate else None,
        key_cache,
        value_cache,
        num_heads=shape.num_heads,
        slot_mapping=torch.from_numpy(tables.slot_mapping).to(DEVICE),
        token_tags=torch.from_numpy(np.repeat(tables.row_tags, np.diff(tables.cu_seqlens))).to(DEVICE),
        block_tags=block_tags,
        refused=refused,
        scales=scales,
        check_owners=check_owners,
    )
    launched: list[dict[str, Any]] = []

    def note(*args: Any, **options: Any) -> None:
        launched.append(
            {name: value for name, value in options.items() if name.startswith("HAS_") or name in ("CHECK", "FP8")}
        )

    kernel = attention.paged_attention_kernel
    kernel.add_pre_run_hook(note)
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN
    try:
        out = attention.paged_attention(
            qkv[:, : shape.num_heads],
            key_cache,
            value_cache,
            plan=plan,
            shape=launch,
            scale=shape.head_size**-0.5,
            window=features.window,
            soft_cap=features.soft_cap,
            sinks=None if features.sinks is None else features.sinks.to(DEVICE),
            scales=scales,
            check_owners=check_owners,
        )
    finally:
        torch.use_deterministic_algorithms(False)
        kernel.pre_run_hooks.remove(note)
    return Result(
        out.cpu(),
        plan,
        key_cache.cpu(),
        value_cache.cpu(),
        block_tags.cpu(),
        (refused != NO_BLOCK).nonzero().flatten().tolist(),
        (plan.refused != NO_BLOCK).nonzero().flatten().tolist(),
        launched,
    )


def twin(
    shape: Shape, step: Step, features: Features = PLAIN, scales: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and caches as kernels/reference.py has them."""
    key_cache, value_cache = step.key_cache.clone(), step.value_cache.clone()
    is_fp8 = key_cache.dtype == torch.uint8
    value_start = shape.num_heads + shape.num_kv_heads
    rotated = step.qkv[:, :value_start]
    if features.rotate:
        rotated = reference.rope(rotated, step.cos, step.sin)
    slots = torch.from_numpy(step.tables.slot_mapping)
    key, value = rotated[:, shape.num_heads :], step.qkv[:, value_start:]
    if is_fp8:
        key, value = (reference.to_e4m3(part, scale) for part, scale in zip((key, value), scales, strict=True))
    reference.store_kv(key, value, key_cache, value_cache, slots)
    read = (key_cache, value_cache)
    if is_fp8:
        read = (reference.from_e4m3(key_cache, scales[0]), reference.from_e4m3(value_cache, scales[1]))
    out = reference.paged_attention(
        rotated[:, : shape.num_heads],
        *read,
        cu_seqlens=torch.from_numpy(step.tables.cu_seqlens),
        kv_lens=torch.from_numpy(step.tables.kv_lens),
        block_tables=torch.from_numpy(step.tables.block_tables),
        scale=shape.head_size**-0.5,
        window=features.window,
        soft_cap=features.soft_cap,
        sinks=features.sinks,
    )
    return out, key_cache, value_cache


def in_bytes(step: Step, scales: tuple[float, float] = (1.0, 1.0)) -> Step:
    """The same step on a cache in e4m3."""
    key_cache, value_cache = (
        reference.to_e4m3(cache, scale) for cache, scale in zip((step.key_cache, step.value_cache), scales, strict=True)
    )
    return replace(step, key_cache=key_cache, value_cache=value_cache)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def share_first_block(step: Step) -> Step:
    """Row 1 reads its first block from row 0, as one domain's rows with one beginning do."""
    tables = step.tables
    block_tables, row_tags, block_tags = tables.block_tables.copy(), tables.row_tags.copy(), tables.block_tags.copy()
    block_tables[1, 0] = block_tables[0, 0]
    block_tags[block_tags == row_tags[1]] = row_tags[0]
    row_tags[1] = row_tags[0]
    return replace(step, tables=replace(tables, block_tables=block_tables, row_tags=row_tags, block_tags=block_tags))


def fill(step: Step, number: float) -> Step:
    """Every slot that nobody wrote holds ``number``."""
    caches = [
        torch.where(cache.isnan(), number, cache.float()).to(cache.dtype)
        for cache in (step.key_cache, step.value_cache)
    ]
    return replace(step, key_cache=caches[0], value_cache=caches[1])


def with_tables(step: Step, **changes: Any) -> Step:
    tables: StepTables = replace(step.tables, **changes)
    return replace(step, tables=tables)
