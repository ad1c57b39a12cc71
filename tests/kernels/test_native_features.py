"""Windows, soft caps, sinks and queries that come rotated: against dense attention in float64 that knows no blocks and
no tiles, and the same bits in any company."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.cpu.backend import NativeBackend
from tests.kernels.native import Features, Shape, Step, attend, bits, every_isa, make_step, random_row, run, with_tables
from tests.kernels.test_native_bits import DTYPES, put, stored

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
LENGTHS = st.one_of(st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 97]), st.integers(1, 150))
WINDOWS = st.sampled_from([0, 1, 2, 5, 31, 32, 33, 64, 100, 10_000])
HEADS = 6


@st.composite
def features(draw: st.DrawFn) -> Features:
    sinks = draw(st.sampled_from(["none", "some", "minus infinity"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    some = torch.randn(HEADS, generator=generator) * 3
    return Features(
        window=draw(WINDOWS),
        soft_cap=draw(st.sampled_from([0.0, 0.5, 30.0])),
        sinks=None if sinks == "none" else some if sinks == "some" else torch.full((HEADS,), -math.inf),
        rotate=draw(st.booleans()),
    )


def dense(shape: Shape, step: Step, wanted: Features) -> Tensor:
    """float64 [T, Hq, D], over what the caches hold after the run."""
    query = step.qkv[:, : shape.num_heads]
    if wanted.rotate:
        query = reference.rope(query, step.cos, step.sin)
    out = torch.zeros((len(query), shape.num_heads, shape.head_size), dtype=torch.float64)
    tables = step.tables
    for row, kv_len in enumerate(tables.kv_lens.tolist()):
        key, value = (stored(cache, tables.block_tables[row], kv_len).double() for cache in caches(step))
        start, end = tables.cu_seqlens[row : row + 2].tolist()
        for token in range(start, end):
            position = kv_len - (end - token)
            first = max(0, position - wanted.window + 1) if wanted.window else 0
            for head in range(shape.num_heads):
                group = head // (shape.num_heads // shape.num_kv_heads)
                scores = key[first : position + 1, group] @ query[token, head].double() * shape.head_size**-0.5
                if wanted.soft_cap:
                    scores = wanted.soft_cap * torch.tanh(scores / wanted.soft_cap)
                if wanted.sinks is not None:
                    scores = torch.cat((scores, wanted.sinks[head : head + 1].double()))
                weights = scores.softmax(dim=0)[: position + 1 - first]
                out[token, head] = weights @ value[first : position + 1, group]
    return out


def caches(step: Step) -> tuple[Tensor, Tensor]:
    return step.key_cache, step.value_cache


@every_isa
@given(
    wanted=features(),
    num_kv_heads=st.sampled_from([1, 2, 6]),
    head_size=st.sampled_from([8, 14, 64]),
    block_size=st.sampled_from([1, 5, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    parts=st.lists(st.tuples(LENGTHS, st.sampled_from([0.0, 0.5, 0.97, 1.0])), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
)
def test_features_match_dense_attention(
    isa: str,
    wanted: Features,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    parts: list[tuple[int, float]],
    seed: int,
) -> None:
    shape = Shape(HEADS, num_kv_heads, head_size, block_size, dtype)
    rows = [random_row(shape, length, seed + index) for index, (length, _) in enumerate(parts)]
    step = make_step(shape, rows, [(int(length * part), length) for length, part in parts], seed)
    got = run(NativeBackend(isa), shape, step, features=wanted)
    torch.testing.assert_close(got.double(), dense(shape, step, wanted), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    if not wanted.rotate:
        key = step.key_cache.flatten(0, 1)[step.tables.slot_mapping]
        assert torch.equal(key, step.qkv[:, HEADS : HEADS + num_kv_heads]), "keys are stored as they came"


@every_isa
@given(
    wanted=features(),
    length=st.sampled_from([1, 33, 64, 97, 140]),
    cuts=st.lists(st.integers(1, 140), max_size=6),
    block_sizes=st.lists(st.sampled_from([1, 5, 32, 64]), min_size=2, max_size=2),
    company=st.lists(st.integers(1, 90), max_size=3),
    num_threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**20),
)
def test_rows_with_features(
    isa: str,
    wanted: Features,
    length: int,
    cuts: list[int],
    block_sizes: list[int],
    company: list[int],
    num_threads: int,
    seed: int,
) -> None:
    shape, other = (Shape(HEADS, 2, 16, size, torch.bfloat16) for size in block_sizes)
    row = random_row(shape, length, seed)
    whole_step = make_step(shape, [row], [(0, length)], seed)
    whole = run(NativeBackend(isa, 1), shape, whole_step, features=wanted)
    keys = stored(whole_step.key_cache, whole_step.tables.block_tables[0], length)

    def resumed(first: int, end: int) -> Tensor:
        rows = [random_row(other, size, seed + 1 + index) for index, size in enumerate(company)]
        rows.append(row)
        parts = [(r.length // 2, r.length) for r in rows]
        parts[-1] = (first, end)
        step = make_step(other, rows, parts, seed + first + 1)
        put(step.key_cache, step.tables.block_tables[len(rows) - 1], keys[:first])
        return run(NativeBackend(isa, num_threads), other, step, features=wanted)[first - end :]

    edges = [0, *sorted({cut for cut in cuts if cut < length}), length]
    pieces = torch.cat([resumed(a, b) for a, b in itertools.pairwise(edges)])
    assert torch.equal(bits(pieces), bits(whole))
    assert torch.equal(bits(resumed(length - 1, length)), bits(whole[-1:])), "the last token as a decode row"


@every_isa
@pytest.mark.parametrize("window", [1, 20, 32, 45])
def test_what_lies_outside_the_window_is_not_read(isa: str, window: int) -> None:
    """Blocks before it may be gone, foreign or broken: nobody looks."""
    shape = Shape(HEADS, 2, 16, 8, torch.bfloat16)
    wanted = Features(window=window)
    step = make_step(shape, [random_row(shape, 130, 1)], [(129, 130)])
    good = run(NativeBackend(isa), shape, step, features=wanted)
    first = 130 - window
    tables, tags = step.tables.block_tables.copy(), step.tables.block_tags.copy()
    gone = tables[0, : first // 8].copy()
    tags[gone] = 99
    for cache in caches(step):
        cache[gone] = math.nan
        cache[int(tables[0, first // 8]), : first % 8] = math.nan
    tables[0, : first // 8 : 2] = -1
    assert torch.equal(
        run(NativeBackend(isa), shape, with_tables(step, block_tables=tables, block_tags=tags), features=wanted), good
    )


@every_isa
def test_a_sink_of_minus_infinity_is_none(isa: str) -> None:
    shape = Shape(HEADS, 3, 16, 8, torch.float32)
    sinks = torch.full((HEADS,), -math.inf)
    steps = [make_step(shape, [random_row(shape, 70, 1)], [(30, 70)]) for _ in range(2)]
    outs = [
        run(NativeBackend(isa), shape, step, features=Features(sinks=s))
        for step, s in zip(steps, (None, sinks), strict=True)
    ]
    assert np.array_equal(outs[0].numpy(), outs[1].numpy())


@every_isa
@pytest.mark.parametrize("part", ["key", "value"])
def test_a_broken_number_harms_those_who_see_it(isa: str, part: str) -> None:
    """Tokens of one chunk share a tile, and not what they see of it."""
    shape = Shape(HEADS, HEADS, 16, 8, torch.float32)
    row = random_row(shape, 90, 2)
    row.qkv[10, HEADS + 3 if part == "key" else 2 * HEADS + 3] = math.nan
    step = make_step(shape, [row], [(0, 90)])
    out = run(NativeBackend(isa), shape, step, features=Features(window=20))
    broken = out.isnan().any(dim=2)
    assert broken[:, 3].nonzero().flatten().tolist() == list(range(10, 30))
    assert not broken[:, :3].any()
    assert not broken[:, 4:].any()


@every_isa
@given(
    layers=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 6]), st.sampled_from([8, 16]), st.sampled_from(DTYPES), features()),
        min_size=2,
        max_size=4,
    )
)
def test_layers_that_differ_share_a_plan(isa: str, layers: list[tuple[int, int, torch.dtype, Features]]) -> None:
    """What a plan holds of the layer before must not reach the next one."""
    backend, plan = NativeBackend(isa), None
    for num_kv_heads, head_size, dtype, wanted in layers:
        shape = Shape(HEADS, num_kv_heads, head_size, 16, dtype)
        step = make_step(shape, [random_row(shape, 70, index) for index in range(2)], [(69, 70), (40, 70)])
        plan = plan or backend.plan(step.tables)  # of the first: the tables are equal
        want = run(backend, shape, copy.deepcopy(step), features=wanted)
        got = attend(backend, shape, step, plan, wanted)
        assert torch.equal(bits(got), bits(want))


@every_isa
def test_angles_are_checked_again_for_other_heads(isa: str) -> None:
    """The last layer's angles are taken for good, but only for heads of the same size: else memory is read that is not
    theirs."""
    backend, small, large = NativeBackend(isa), *(Shape(HEADS, 2, size, 16, torch.float32) for size in (8, 16))
    step, other = (make_step(shape, [random_row(shape, 40, 0)], [(39, 40)]) for shape in (small, large))
    plan = backend.plan(step.tables)
    attend(backend, small, step, plan)
    other.cos, other.sin = step.cos, step.sin
    with pytest.raises(AssertionError):
        attend(backend, large, other, plan)
