"""Paged attention against dense attention in float64 that knows nothing of blocks."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference, torch_cpu

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    block_size: int
    num_kv_heads: int
    group_size: int
    head_size: int
    rows: tuple[tuple[int, int], ...]  # (new tokens, tokens in the cache with them)
    dtype: torch.dtype
    seed: int
    window: int = 0
    soft_cap: float = 0.0
    has_sinks: bool = False


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    edges = [1, block_size - 1, block_size, block_size + 1, 3 * block_size]
    lengths = st.one_of(st.sampled_from([edge for edge in edges if edge > 0]), st.integers(1, 40))
    rows = []
    for kv_len in draw(st.lists(lengths, min_size=1, max_size=5)):
        num_new = draw(st.sampled_from([0, 1, 1, kv_len, max(1, kv_len // 2)]))
        rows.append((num_new, kv_len))
    return Case(
        block_size=block_size,
        num_kv_heads=draw(st.sampled_from([1, 3])),
        group_size=draw(st.sampled_from([1, 2, 3])),
        head_size=draw(st.sampled_from([4, 16])),
        rows=tuple(rows),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 2**31)),
        window=draw(st.sampled_from([0, 0, 1, block_size, 7])),
        soft_cap=draw(st.sampled_from([0.0, 0.0, 0.5, 30.0])),
        has_sinks=draw(st.booleans()),
    )


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    cu_seqlens: Tensor
    kv_lens: Tensor
    block_tables: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    sinks: Tensor | None


def build(case: Case) -> Inputs:
    """Scattered blocks in random order; every slot that no row owns holds NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    num_blocks = [-(-kv_len // case.block_size) for _, kv_len in case.rows]
    order = torch.randperm(sum(num_blocks) + 2, generator=generator).tolist()
    shape = (len(order), case.block_size, case.num_kv_heads, case.head_size)
    key_cache, value_cache = (torch.full(shape, math.nan, dtype=case.dtype) for _ in range(2))
    tables = np.full((len(case.rows), max(num_blocks) + 1), -1, dtype=np.int32)
    keys, values = [], []
    for row, (_, kv_len) in enumerate(case.rows):
        blocks = [order.pop() for _ in range(num_blocks[row])]
        tables[row, : len(blocks)] = blocks
        slots = torch.tensor(
            [blocks[i // case.block_size] * case.block_size + i % case.block_size for i in range(kv_len)]
        )
        key, value = (torch.randn((kv_len, *shape[2:]), generator=generator).to(case.dtype) for _ in range(2))
        torch_cpu.store_kv(key, value, key_cache, value_cache, slots)
        keys.append(key)
        values.append(value)
    cu_seqlens = np.cumsum([0] + [num_new for num_new, _ in case.rows]).astype(np.int32)
    heads = case.num_kv_heads * case.group_size
    query = torch.randn((int(cu_seqlens[-1]), heads, case.head_size), generator=generator).to(case.dtype)
    return Inputs(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        cu_seqlens=torch.from_numpy(cu_seqlens),
        kv_lens=torch.tensor([kv_len for _, kv_len in case.rows], dtype=torch.int32),
        block_tables=torch.from_numpy(tables),
        keys=keys,
        values=values,
        sinks=torch.randn(heads, generator=generator) if case.has_sinks else None,
    )


def dense(case: Case, inputs: Inputs, scale: float) -> Tensor:
    """Float64, one query at a time, straight from the definition."""
    out = []
    start = 0
    for row, (num_new, kv_len) in enumerate(case.rows):
        for index in range(num_new):
            position = kv_len - num_new + index
            seen = [j for j in range(kv_len) if j <= position and (not case.window or position - case.window < j)]
            for head in range(case.num_kv_heads * case.group_size):
                key = inputs.keys[row][seen, head // case.group_size].double()
                value = inputs.values[row][seen, head // case.group_size].double()
                scores = key @ inputs.query[start + index, head].double() * scale
                if case.soft_cap:
                    scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
                weights = scores.exp()
                sink = 0.0 if inputs.sinks is None else inputs.sinks[head].double().exp()
                out.append(weights @ value / (weights.sum() + sink))
        start += num_new
    return torch.stack(out).view(inputs.query.shape) if out else inputs.query.double()


@given(cases())
def test_both_twins_match_dense_attention(case: Case) -> None:
    inputs = build(case)
    scale = case.head_size**-0.5
    tables = {"cu_seqlens": inputs.cu_seqlens, "kv_lens": inputs.kv_lens, "block_tables": inputs.block_tables}
    expected = dense(case, inputs, scale)
    plan = torch_cpu.plan_attention(**tables, block_size=case.block_size)
    assert len(plan.decode_tokens) == sum(num_new == 1 for num_new, _ in case.rows)
    assert len(plan.chunks) == sum(num_new > 1 for num_new, _ in case.rows)
    rule = {"scale": scale, "window": case.window, "soft_cap": case.soft_cap, "sinks": inputs.sinks}
    tensors = (inputs.query, inputs.key_cache, inputs.value_cache)
    results = {
        "reference": reference.paged_attention(*tensors, **tables, **rule),
        "torch": torch_cpu.paged_attention(*tensors, plan=plan, **rule),
    }
    for name, result in results.items():
        assert result.dtype == case.dtype
        torch.testing.assert_close(
            result.double(),
            expected,
            atol=TOLERANCE[case.dtype],
            rtol=TOLERANCE[case.dtype],
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_no_rows_with_tokens_is_a_no_op() -> None:
    case = Case(4, 1, 1, 4, ((0, 5), (0, 1)), torch.float32, 0)
    inputs = build(case)
    tables = {"cu_seqlens": inputs.cu_seqlens, "kv_lens": inputs.kv_lens, "block_tables": inputs.block_tables}
    plan = torch_cpu.plan_attention(**tables, block_size=4)
    assert torch_cpu.paged_attention(
        inputs.query, inputs.key_cache, inputs.value_cache, plan=plan, scale=1.0
    ).shape == (
        0,
        1,
        4,
    )


@pytest.mark.parametrize("ops", [torch_cpu, reference])
def test_store_writes_its_slots_and_nothing_else(ops: object) -> None:
    key_cache, value_cache = torch.zeros(3, 4, 2, 5), torch.zeros(3, 4, 2, 5)
    key, value = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    slots = torch.tensor([11, 0, 6])
    ops.store_kv(key, value, key_cache, value_cache, slots)  # type: ignore[attr-defined]
    assert torch.equal(key_cache.flatten(0, 1)[slots], key)
    assert torch.equal(value_cache.flatten(0, 1)[slots], value)
    rest = [slot for slot in range(12) if slot not in (11, 0, 6)]
    assert not key_cache.flatten(0, 1)[rest].any()
    assert not value_cache.flatten(0, 1)[rest].any()
