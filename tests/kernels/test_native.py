"""The native kernels against their twins, on every instruction set of this machine, and what they refuse to touch."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from kernels.backend import KernelError, OwnershipError
from kernels.choice import choose
from kernels.cpu import library
from kernels.cpu.backend import NativeBackend
from kernels.torch_cpu import TorchBackend
from tests.kernels.native import (
    Shape,
    angles,
    bits,
    every_isa,
    expected,
    isas,
    make_step,
    random_row,
    run,
    with_tables,
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
LENGTHS = st.one_of(st.sampled_from([1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65]), st.integers(1, 150))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    return Shape(
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 3, 4, 5, 9])),
        num_kv_heads=num_kv_heads,
        head_size=draw(st.sampled_from([2, 8, 14, 16, 64, 80])),
        block_size=draw(st.sampled_from([1, 3, 8, 32, 48])),
        dtype=draw(DTYPES),
    )


@every_isa
@given(shape=shapes(), lengths=st.lists(LENGTHS, min_size=1, max_size=5), seed=st.integers(0, 2**20), data=st.data())
def test_attention_matches_its_twin(isa: str, shape: Shape, lengths: list[int], seed: int, data: st.DataObject) -> None:
    rows = [random_row(shape, length, seed + index) for index, length in enumerate(lengths)]
    firsts = st.sampled_from(["decode", "prefill", "nothing", "somewhere"])
    parts = []
    for length in lengths:
        kind = data.draw(firsts)
        first = {"decode": length - 1, "prefill": 0, "nothing": length}.get(kind, length // 2)
        parts.append((first, length))
    step = make_step(shape, rows, parts, seed)
    twin = copy.deepcopy(step)
    out, want = run(NativeBackend(isa), shape, step), expected(shape, twin)
    assert out.dtype == shape.dtype
    torch.testing.assert_close(out, want, atol=TOLERANCE[shape.dtype], rtol=TOLERANCE[shape.dtype])
    for ours, theirs in ((step.key_cache, twin.key_cache), (step.value_cache, twin.value_cache)):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2, equal_nan=True)
        untouched = torch.ones(ours.shape[0] * ours.shape[1], dtype=torch.bool)
        untouched[step.tables.slot_mapping] = False
        assert torch.equal(bits(ours).flatten(0, 1)[untouched], bits(theirs).flatten(0, 1)[untouched])


@every_isa
@given(
    num_tokens=st.integers(0, 40),
    size=st.sampled_from([1, 7, 16, 33, 576]),
    dtype=DTYPES,
    add=st.booleans(),
    seed=st.integers(0, 99),
)
def test_norm_and_activation_match_their_twins(
    isa: str, num_tokens: int, size: int, dtype: torch.dtype, add: bool, seed: int
) -> None:
    backend, generator = NativeBackend(isa), torch.Generator().manual_seed(seed)
    x, weight = torch.randn((num_tokens, size), generator=generator).to(dtype), torch.randn(size).to(dtype)
    residual = torch.randn((num_tokens, size), generator=generator) if add else None
    want = reference.rms_norm(x, weight, 1e-5, residual)
    got = backend.rms_norm(x, weight, 1e-5, residual)
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(got[0], want[0], **tolerance)
    torch.testing.assert_close(got[1], want[1], atol=1e-6, rtol=1e-6)
    gate_up = torch.randn((num_tokens, 2 * size), generator=generator).mul(20).to(dtype)
    torch.testing.assert_close(backend.silu_and_mul(gate_up), reference.silu_and_mul(gate_up), **tolerance)
    for scale in (20.0, 1.0, 0.05):
        gate_up = torch.randn((num_tokens, 2 * size), generator=generator).mul(scale).to(dtype)
        for tanh in (False, True):
            want_gelu = reference.gelu_and_mul(gate_up, tanh=tanh)
            torch.testing.assert_close(backend.gelu_and_mul(gate_up, tanh=tanh), want_gelu, **tolerance)


@every_isa
def test_numbers_that_broke_stay_broken(isa: str) -> None:
    backend = NativeBackend(isa)
    broken = torch.tensor([[math.nan, 1.0, 2.0, 3.0]])
    assert backend.silu_and_mul(broken).isnan().tolist() == [[True, False]]
    for tanh in (False, True):
        assert backend.gelu_and_mul(broken, tanh=tanh).isnan().tolist() == [[True, False]]
    assert backend.rms_norm(broken, torch.ones(4), 1e-5)[0].isnan().all()
    shape = Shape(2, 1, 8, 4, torch.float32)
    row = random_row(shape, 9, 0)
    row.qkv[3] = math.nan
    out = run(backend, shape, make_step(shape, [row], [(0, 9)]))
    assert out.isnan().flatten(1).any(dim=1).tolist() == [False] * 3 + [True] * 6
    edge = torch.tensor([[-1e30, -100.0, -0.0, 90.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(backend.silu_and_mul(edge), reference.silu_and_mul(edge), atol=1e-35, rtol=1e-6)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["owner", "too large", "negative", "table ends"])
def test_a_block_that_is_not_the_rows_is_not_read_and_raises(isa: str, dtype: torch.dtype, fault: str) -> None:
    shape = Shape(6, 2, 16, 8, dtype)
    rows = [random_row(shape, 40, index) for index in range(2)]
    step = make_step(shape, rows, [(39, 40), (20, 40)])
    good = run(NativeBackend(isa), shape, copy.deepcopy(step))
    tables, tags = step.tables.block_tables.copy(), step.tables.block_tags.copy()
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
    broken = with_tables(step, block_tables=tables, block_tags=tags)
    step.key_cache[victim] = math.nan
    step.value_cache[victim] = math.nan
    backend = NativeBackend(isa)
    out = run(backend, shape, broken, check=False)
    assert not out[0].any(), "nothing of the row leaves"
    assert torch.equal(bits(out[1:]), bits(good[1:])), "its neighbour is as it was"
    with pytest.raises(OwnershipError, match="another owner" if fault == "owner" else "out of range") as caught:
        run(backend, shape, broken)
    assert caught.value.tokens == (0,), "the row's first token"
    assert caught.value.block_id == tables[0, 1]


@every_isa
def test_a_foreign_slot_is_not_written(isa: str) -> None:
    shape = Shape(2, 1, 8, 4, torch.float32)
    step = make_step(shape, [random_row(shape, 5, 0)], [(4, 5)])
    before = step.key_cache.clone()
    slots = step.tables.slot_mapping.copy()
    for slot in (-1, len(step.tables.block_tags) * 4, int(np.flatnonzero(step.tables.block_tags == 0)[0]) * 4):
        slots[0] = slot
        with pytest.raises(OwnershipError):
            run(NativeBackend(isa), shape, with_tables(step, slot_mapping=slots))
        assert torch.equal(bits(step.key_cache), bits(before))


@every_isa
def test_tables_that_cannot_be_are_refused(isa: str) -> None:
    shape = Shape(2, 1, 8, 4, torch.float32)
    tables = make_step(shape, [random_row(shape, 5, 0)], [(3, 5)]).tables
    step = make_step(shape, [random_row(shape, 5, 0)], [(3, 5)])
    for changes in (
        {"kv_lens": np.array([1], dtype=np.int32)},
        {"kv_lens": np.array([500], dtype=np.int32)},
        {"cu_seqlens": np.array([1, 2], dtype=np.int32)},
        {"slot_mapping": tables.slot_mapping[:1]},
    ):
        with pytest.raises(ValueError):
            NativeBackend(isa).plan(with_tables(step, **changes).tables)


def test_the_choice_of_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines: list[str] = []
    assert isinstance(choose("torch", 1, lines.append), TorchBackend)
    for isa in isas():
        assert choose(isa, 1, lines.append).name == f"native-{isa}"
    if isas():
        assert choose("auto", 1, lines.append).name == f"native-{isas()[0]}"
    assert lines == []
    for content in (None, b"not a library"):
        path = tmp_path / "_native.so"
        if content is not None:
            path.write_bytes(content)
        library.load.cache_clear()
        monkeypatch.setattr(library, "PATH", path)
        assert choose("auto", 1, lines.append).name == "torch-cpu"
        assert "make native" in lines.pop()
        with pytest.raises(KernelError):
            choose("portable", 1, lines.append)
    monkeypatch.undo()
    library.load.cache_clear()


def test_angles_are_by_position_only() -> None:
    shape = Shape(1, 1, 8, 4, torch.float32)
    assert torch.equal(angles(shape, torch.arange(9))[0][5:], angles(shape, torch.arange(5, 9))[0])
