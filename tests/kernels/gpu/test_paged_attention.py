"""The attention kernel against its twin; a row's bits, whatever its company; what a row may not read."""

import importlib.util
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import InterpreterError

from kernels.gpu import attention, paged_attention
from kernels.gpu.launch_table import AttentionShape
from tests.kernels.gpu.steps import SMALL, SPLIT, close, few, fill, in_bytes, run, share_first_block, twin, with_tables
from tests.kernels.native import Features, Shape, Step, bits, make_step, random_row

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    num_kv_heads = draw(st.sampled_from([1, 2]))
    return Shape(
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 3, 5, 8])),
        num_kv_heads=num_kv_heads,
        head_size=draw(st.sampled_from([8, 16, 24])),
        block_size=draw(st.sampled_from([1, 4, 16, 17])),
        dtype=draw(DTYPES),
    )


@st.composite
def parts(draw: st.DrawFn, block_size: int, rows_max: int) -> list[tuple[int, int]]:
    """Ranges of positions, one a row: nothing, one token, a chunk, a whole prompt."""
    edges = [1, block_size - 1, block_size, block_size + 1, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 1]
    lengths = draw(st.lists(st.sampled_from([n for n in edges if n > 0]), min_size=1, max_size=rows_max))
    return [
        (draw(st.sampled_from([end, end - 1, end - 1, max(0, end - 6), 0 if end <= 9 else end - 9])), end)
        for end in lengths
    ]


@few
@given(shape=shapes(), seed=st.integers(0, 2**20), data=st.data())
def test_attention_matches_its_twin(shape: Shape, seed: int, data: st.DataObject) -> None:
    spans = data.draw(parts(shape.block_size, 3))
    features = Features(
        window=data.draw(st.sampled_from([0, 0, 1, 7, SPLIT + 3])),
        soft_cap=data.draw(st.sampled_from([0.0, 0.0, 0.5, 30.0])),
        sinks=torch.randn(shape.num_heads, generator=torch.Generator().manual_seed(seed))
        if data.draw(st.booleans())
        else None,
        rotate=data.draw(st.booleans()),
    )
    rows = [random_row(shape, end, seed + index) for index, (_, end) in enumerate(spans)]
    step = make_step(shape, rows, spans, seed)
    got = run(shape, step, features=features)
    want, _, _ = twin(shape, step, features)
    close(got.out, want, shape.dtype)
    assert got.refused_rows == []
    num_new = np.diff(step.tables.cu_seqlens)
    waiting = num_new[step.tables.kv_lens > SPLIT]
    assert len(got.plan.merge_tokens) == waiting.sum(), "rows of one split finish at once, the others are merged"
    if num_new.sum():
        (branch,) = got.launched
        assert branch == {
            "HAS_WINDOW": features.window > 0,
            "HAS_CAP": features.soft_cap > 0,
            "HAS_SINKS": features.sinks is not None,
            "FP8": False,
            "CHECK": True,
        }


def test_a_shared_prefix_is_read_by_both() -> None:
    shape = Shape(4, 2, 16, 16, torch.float32)
    step = share_first_block(
        make_step(shape, [random_row(shape, 40, index) for index in range(2)], [(39, 40), (20, 33)])
    )
    got = run(shape, step)
    close(got.out, twin(shape, step)[0], shape.dtype)
    assert got.refused_rows == []


def row_slots(step: Step, row: int, block_size: int, end: int) -> Tensor:
    at = np.arange(end)
    return torch.from_numpy(
        step.tables.block_tables[row, at // block_size].astype(np.int64) * block_size + at % block_size
    )


def same_bits_in_company(
    dtype: torch.dtype, spans: list[tuple[int, int]], features: Features, *, is_fp8: bool = False
) -> None:
    """One row: all at once, alone, in one large block; then as ``spans`` says, among others, in small blocks."""
    shape = Shape(3, 1, 16, 64, dtype)
    row = random_row(shape, spans[-1][1], 3)
    kept = in_bytes if is_fp8 else lambda step: step
    step = kept(make_step(shape, [row], [(0, row.length)]))
    whole = run(shape, step, features=features)
    assert len(whole.plan.merge_tokens) == (row.length if row.length > SPLIT else 0)
    slots = row_slots(step, 0, shape.block_size, row.length)
    for index, (first, end) in enumerate(spans):
        placed = Shape(3, 1, 16, [1, 7, 16][index % 3], dtype)
        others = [(0, 2), (38, 39)][: index % 3]
        company = [random_row(placed, length, length) for _, length in others]
        step = kept(make_step(placed, [*company, row], [*others, (first, end)], index))
        past = row_slots(step, len(others), placed.block_size, first)
        for ours, its in ((step.key_cache, whole.key_cache), (step.value_cache, whole.value_cache)):
            ours.flatten(0, 1)[past] = its.flatten(0, 1)[slots[:first]]
        launch = AttentionShape(block_m=[16, 32, 64][index % 3], tile=SMALL.tile)
        got = run(placed, step, features=features, launch=launch).out[-(end - first) :]
        assert torch.equal(bits(got), bits(whole.out[first:end])), f"positions {first} to {end}"


@pytest.mark.parametrize(
    ("dtype", "spans", "features", "is_fp8"),
    [
        (torch.float32, [(0, 33), (33, 36), (36, 37)], Features(window=20), False),
        (torch.bfloat16, [(0, 9), (9, 33), (33, 34)], Features(sinks=torch.linspace(-1, 1, 3)), False),
        (torch.bfloat16, [(0, 20), (20, 33), (33, 34)], Features(), True),
    ],
)
def test_a_rows_bits_do_not_depend_on_company_chunks_or_blocks(
    dtype: torch.dtype, spans: list[tuple[int, int]], features: Features, is_fp8: bool
) -> None:
    same_bits_in_company(dtype, spans, features, is_fp8=is_fp8)


@pytest.mark.deep
@settings(max_examples=30, deadline=None)
@given(dtype=DTYPES, cuts=st.lists(st.integers(1, 2 * SPLIT), max_size=3), data=st.data())
def test_nor_on_any_of_them(dtype: torch.dtype, cuts: list[int], data: st.DataObject) -> None:
    """Three splits, two tiles in the full ones. An example takes the interpreter two seconds."""
    spans = [*pairwise(sorted({0, *cuts, 2 * SPLIT + 1})), (2 * SPLIT + 1, 2 * SPLIT + 2)]
    sinks = torch.randn(3, generator=torch.Generator().manual_seed(1)) if data.draw(st.booleans()) else None
    same_bits_in_company(
        dtype,
        spans,
        Features(window=data.draw(st.sampled_from([0, 9, 40])), sinks=sinks),
        is_fp8=data.draw(st.booleans()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_fillings_of_what_a_row_does_not_own_give_equal_bits(dtype: torch.dtype) -> None:
    shape = Shape(4, 2, 16, 8, dtype)
    rows = [random_row(shape, 41, index) for index in range(2)]
    step = make_step(shape, rows, [(40, 41), (0, 9)])
    first, second, broken = (run(shape, filled) for filled in (fill(step, 3.0), fill(step, -1e4), step))
    assert torch.equal(bits(first.out), bits(second.out))
    assert torch.equal(bits(first.out), bits(broken.out)), "and so does NaN"
    assert not first.out.isnan().any()


def refuses(fault: str) -> None:
    """A decode row whose second block is not its own: it is not read, adds nothing, and is named."""
    shape = Shape(4, 2, 16, 8, torch.float32)
    rows = [random_row(shape, 40, index) for index in range(3)]
    step = fill(make_step(shape, rows, [(39, 40), (38, 40), (20, 24)]), 5.0)
    good = run(shape, step)
    tables, tags, kv_lens = step.tables.block_tables.copy(), step.tables.block_tags.copy(), step.tables.kv_lens.copy()
    kept = tables.copy()
    kept[0, 1:-1], kv_lens[0] = tables[0, 2:], 32
    want, _, _ = twin(shape, with_tables(step, block_tables=kept, kv_lens=kv_lens))
    victim = int(tables[0, 1])
    match fault:
        case "owner":
            tags[victim] = 99
        case "too large":
            tables[0, 1] = len(tags)
        case "negative":
            tables[0, 1] = -7
        case _:
            tables[0, 1] = -1
    step.key_cache[victim] = step.value_cache[victim] = math.nan
    got = run(shape, with_tables(step, block_tables=tables, block_tags=tags))
    assert got.refused_rows == [0]
    assert int(got.plan.refused[0]) == tables[0, 1]
    close(got.out[0], want[0], shape.dtype)
    assert torch.equal(bits(got.out[1:]), bits(good.out[1:])), "the neighbours are as they were"


@pytest.mark.parametrize("fault", ["owner", "too large", "negative", "table ends"])
def test_a_block_that_is_not_the_rows_is_not_read_and_is_named(fault: str) -> None:
    refuses(fault)


def test_the_check_can_be_left_out_to_measure_it() -> None:
    shape = Shape(2, 1, 16, 8, torch.float32)
    step = make_step(shape, [random_row(shape, 12, 0)], [(11, 12)])
    checked, unchecked = run(shape, step), run(shape, step, check_owners=False)
    assert [branch["CHECK"] for branch in (*checked.launched, *unchecked.launched)] == [True, False]
    assert torch.equal(bits(checked.out), bits(unchecked.out))


def test_a_step_without_tokens_is_a_no_op() -> None:
    shape = Shape(2, 1, 16, 8, torch.float32)
    got = run(shape, make_step(shape, [random_row(shape, 12, 0)], [(12, 12)]))
    assert got.out.shape == (0, 2, 16)
    assert got.launched == []


def matches() -> None:
    shape = Shape(2, 1, 16, 8, torch.float32)
    spans = [(39, 40), (0, 9), (10, 12)]
    step = make_step(shape, [random_row(shape, end, index) for index, (_, end) in enumerate(spans)], spans)
    close(run(shape, fill(step, 0.0)).out, twin(shape, step)[0], shape.dtype)


def matches_in_bytes() -> None:
    """A cache in e4m3, with scales that are not 1."""
    shape, scales = Shape(2, 1, 16, 8, torch.float32), (0.5, 0.125)
    spans = [(39, 40), (0, 9)]
    rows = [random_row(shape, end, index) for index, (_, end) in enumerate(spans)]
    step = in_bytes(make_step(shape, rows, spans), scales)
    close(run(shape, step, scales=scales).out, twin(shape, step, scales=scales)[0], shape.dtype)


def keeps_bits() -> None:
    same_bits_in_company(torch.float32, [(0, 33), (33, 36)], Features(window=20))


# What is planted, where, and the check above that sees it.
PLANTS: dict[str, tuple[str, str, Callable[[], None]]] = {
    "block table off by one": (
        "block_tables_ptr + at // BLOCK_SIZE",
        "block_tables_ptr + (at // BLOCK_SIZE + 1)",
        matches,
    ),
    "causal mask dropped": ("(at[None, :] <= position[:, None])", "(at[None, :] < end)", matches),
    "cu_seqlens shifted": (
        "start = tl.load(cu_seqlens_ptr + row)\n",
        "start = tl.load(cu_seqlens_ptr + row) + 1\n",
        matches,
    ),
    "ownership check removed": ("readable = readable & (owner == row_tag)", "pass", lambda: refuses("owner")),
    "refusal not told": ("if worst != NO_BLOCK:", "if worst == 12345:", lambda: refuses("owner")),
    "tiles begin where the window begins": (
        "range(begin // TILE * TILE, end, TILE)",
        "range(begin, end, TILE)",
        keeps_bits,
    ),
    "scale of the values dropped": ("acc *= value_scale", "acc *= 1.0", matches_in_bytes),
    "a split lost in the merge": ("for split in range(num_splits):", "for split in range(1, num_splits):", matches),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bugs_are_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of this file, on a kernel with one line changed."""
    right, wrong, check = PLANTS[name]
    source = Path(paged_attention.__file__).read_text()
    assert source.count(right) == 1
    path = tmp_path / "planted.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None
    assert spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    check()  # or the machine is what fails
    monkeypatch.setattr(attention, "paged_attention_kernel", planted.paged_attention_kernel)
    monkeypatch.setattr(attention, "merge_kernel", planted.merge_kernel)
    with pytest.raises((AssertionError, InterpreterError)):  # numpy may stop at what it finds in NaN
        check()
