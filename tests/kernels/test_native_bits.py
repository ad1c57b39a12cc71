"""A row's bits depend on the row alone: not on company, chunking, placement, block size or threads. Every row is
compared, on every instruction set of this machine."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpu.backend import NativeBackend
from tests.kernels.native import Shape, bits, every_isa, make_step, random_row, run

ROW_COUNTS = [*range(1, 71), 127, 128, 129, 255, 256, 257]
DTYPES = [torch.float32, torch.bfloat16]


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_norm_and_activation(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((257, 577), generator=generator).to(dtype)
    residual, weight = torch.randn((257, 577), generator=generator), torch.randn(577).to(dtype)
    gate_up = torch.randn((257, 2 * 95), generator=generator).to(dtype)
    alone = NativeBackend(isa, 1)
    norms = [alone.rms_norm(x[i : i + 1], weight, 1e-5, residual[i : i + 1].clone()) for i in range(257)]
    acts = torch.cat([alone.silu_and_mul(gate_up[i : i + 1]) for i in range(257)])
    gelus = [torch.cat([alone.gelu_and_mul(gate_up[i : i + 1], tanh=t) for i in range(257)]) for t in (False, True)]
    for num_threads in (1, 2):
        backend = NativeBackend(isa, num_threads)
        for count in ROW_COUNTS:
            rows = torch.randperm(257, generator=generator)[:count]
            normed, total = backend.rms_norm(x[rows], weight, 1e-5, residual[rows])
            assert torch.equal(bits(normed), bits(torch.cat([norms[i][0] for i in rows.tolist()])))
            assert torch.equal(bits(total), bits(torch.cat([norms[i][1] for i in rows.tolist()])))
            assert torch.equal(bits(backend.silu_and_mul(gate_up[rows])), bits(acts[rows]))
            for index, want in enumerate(gelus):
                assert torch.equal(bits(backend.gelu_and_mul(gate_up[rows], tanh=bool(index))), bits(want[rows]))


@every_isa
@given(
    dtype=st.sampled_from(DTYPES),
    head_size=st.sampled_from([8, 14, 64]),
    group_size=st.sampled_from([1, 3, 5]),
    length=st.sampled_from([1, 31, 32, 33, 64, 65, 127, 140]),
    cuts=st.lists(st.integers(1, 140), max_size=6),
    block_sizes=st.lists(st.sampled_from([1, 5, 16, 32, 64]), min_size=2, max_size=2),
    company=st.lists(st.integers(1, 90), max_size=4),
    num_threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**20),
)
def test_rows_of_attention(
    isa: str,
    dtype: torch.dtype,
    head_size: int,
    group_size: int,
    length: int,
    cuts: list[int],
    block_sizes: list[int],
    company: list[int],
    num_threads: int,
    seed: int,
) -> None:
    shape, other = (Shape(2 * group_size, 2, head_size, size, dtype) for size in block_sizes)
    row = random_row(shape, length, seed)
    backend = NativeBackend(isa, 1)
    whole_step = make_step(shape, [row], [(0, length)], seed)
    whole = run(backend, shape, whole_step)
    keys = stored(whole_step.key_cache, whole_step.tables.block_tables[0], length)

    def resumed(first: int, end: int) -> Tensor:
        """Positions first..end among others, over the keys that the first pass stored, in other blocks."""
        rows = [random_row(other, size, seed + 1 + index) for index, size in enumerate(company)]
        place = seed % (len(rows) + 1)
        rows.insert(place, row)
        parts = [(len(r.qkv) - 1 - (len(r.qkv) - 1) // 2, len(r.qkv)) for r in rows]
        parts[place] = (first, end)
        step = make_step(other, rows, parts, seed + first + 1)
        put(step.key_cache, step.tables.block_tables[place], keys[:first])
        out = run(NativeBackend(isa, num_threads), other, step)
        start = int(step.tables.cu_seqlens[place])
        return out[start : start + end - first]

    edges = [0, *sorted({cut for cut in cuts if cut < length}), length]
    pieces = torch.cat([resumed(a, b) for a, b in itertools.pairwise(edges)])
    assert torch.equal(bits(pieces), bits(whole))
    assert torch.equal(bits(resumed(length - 1, length)), bits(whole[-1:])), "the last token as a decode row"


def stored(cache: Tensor, blocks: np.ndarray, length: int) -> Tensor:
    return cache[blocks[blocks >= 0].astype(np.int64)].flatten(0, 1)[:length].clone()


def put(cache: Tensor, blocks: np.ndarray, content: Tensor) -> None:
    at = np.arange(len(content))
    slots = blocks[at // cache.shape[1]].astype(np.int64) * cache.shape[1] + at % cache.shape[1]
    cache.flatten(0, 1)[slots] = content
