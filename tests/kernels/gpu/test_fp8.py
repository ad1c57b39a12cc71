"""Keys and values in 8 bits: the bytes, what attention makes of them, and how far that is from the truth."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from kernels.gpu.fp8 import from_e4m3, to_e4m3
from kernels.gpu.launch import options
from tests.kernels.gpu.steps import DEVICE, close, few, in_bytes, run, twin
from tests.kernels.native import Features, Shape, bits, make_step, random_row
from tests.kernels.test_real_magnitudes import HEAD_SIZE, HEADS, KV_HEADS, dense, real_row

BYTES = torch.arange(256, dtype=torch.int64).to(torch.uint8)
BLOCK = 1024
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@triton.jit
def to_e4m3_kernel(number_ptr, byte_ptr, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(byte_ptr + at, to_e4m3(tl.load(number_ptr + at, mask=at < size, other=0.0)), mask=at < size)


@triton.jit
def from_e4m3_kernel(byte_ptr, number_ptr, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    byte = tl.load(byte_ptr + at, mask=at < size, other=0)
    tl.store(number_ptr + at, from_e4m3(byte, number_ptr.dtype.element_ty), mask=at < size)


def bytes_of(numbers: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(numbers), dtype=torch.uint8, device=DEVICE)
    to_e4m3_kernel[(1,)](numbers.to(DEVICE), out, len(numbers), BLOCK=BLOCK, **options())
    return out.cpu()


def known() -> np.ndarray:
    """The 127 numbers of e4m3 from 0 up, by the format's definition."""
    exponent, mantissa = np.divmod(np.arange(127), 8)
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


def edges() -> torch.Tensor:
    """Every number, the middle to the next, and the float32 on either side of each; beyond the largest; both signs."""
    numbers = known()
    middles = (numbers[:-1] + numbers[1:]) / 2
    at = np.concatenate((numbers, middles, [456.0, 464.0, 1e4, np.inf])).astype(np.float32)
    around = np.concatenate((at, np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(np.inf))))
    return torch.from_numpy(np.concatenate((around, -around, [np.nan, 1e-30, -1e-30])).astype(np.float32))


def test_the_twin_rounds_to_the_nearest_and_ties_to_even() -> None:
    numbers = edges()
    distance = np.abs(np.minimum(numbers.abs().double().numpy(), 448.0)[:, None] - known()[None, :])
    nearest = distance.argmin(axis=1)
    ties = (distance == distance.min(axis=1, keepdims=True)).sum(axis=1) == 2
    nearest += (ties & (nearest % 2 == 1)).astype(np.int64)
    want = torch.from_numpy(nearest).to(torch.uint8) | (numbers.signbit().to(torch.uint8) << 7)
    real = ~numbers.isnan()
    assert ties.sum() > 200
    assert torch.equal(reference.to_e4m3(numbers)[real], want[real])
    assert reference.from_e4m3(reference.to_e4m3(numbers))[~real].isnan().all()


def test_bytes_are_the_twins() -> None:
    for numbers in edges().split(BLOCK):
        ours, theirs = bytes_of(numbers), reference.to_e4m3(numbers)
        real = ~numbers.isnan()
        assert torch.equal(ours[real], theirs[real])
        assert (ours[~real] & 0x7F == 0x7F).all()


@few
@given(seed=st.integers(0, 999))
def test_and_of_any_bits(seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 2**32, BLOCK, dtype=np.uint64).astype(np.uint32)
    numbers = torch.from_numpy(raw.view(np.float32))
    real = ~numbers.isnan()
    assert torch.equal(bytes_of(numbers)[real], reference.to_e4m3(numbers)[real])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_byte_becomes_its_number_exactly_in_every_dtype(dtype: torch.dtype) -> None:
    out = torch.empty(256, dtype=dtype, device=DEVICE)
    from_e4m3_kernel[(1,)](BYTES.to(DEVICE), out, 256, BLOCK=256, **options())
    want = reference.from_e4m3(BYTES)
    assert torch.equal(out.cpu().float().nan_to_num(1.0), want.nan_to_num(1.0))
    assert out.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    np.testing.assert_array_equal(want[:127].numpy(), known())


@few
@given(
    dtype=DTYPES,
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    block_size=st.sampled_from([1, 5, 16]),
    scales=st.sampled_from([(1.0, 1.0), (4.0, 0.125)]),
    window=st.sampled_from([0, 7]),
    seed=st.integers(0, 999),
)
def test_what_is_written_and_what_attention_reads(
    dtype: torch.dtype,
    heads: tuple[int, int],
    block_size: int,
    scales: tuple[float, float],
    window: int,
    seed: int,
) -> None:
    """A key that is turned in bfloat16 may be another number in its last bit, and then another byte: not here."""
    shape, features = Shape(*heads, 16, block_size, dtype), Features(window=window, rotate=dtype == torch.float32)
    spans = [(5, 6), (0, 3), (32, 34)]
    rows = [random_row(shape, end, seed + end) for _, end in spans]
    step = in_bytes(make_step(shape, rows, spans, seed, rotate=features.rotate), scales)
    got = run(shape, step, features=features, scales=scales)
    want, key_cache, value_cache = twin(shape, step, features, scales)
    assert torch.equal(got.key_cache, key_cache), "other bytes, slots that nobody wrote among them"
    assert torch.equal(got.value_cache, value_cache)
    assert not got.out.isnan().any(), "slots that nobody wrote are NaN in 8 bits, too"
    assert got.refused_rows == got.refused_tokens == []
    assert all(branch["FP8"] for branch in got.launched)
    close(got.out, want, dtype)


def test_bytes_that_are_not_the_rows_change_nothing() -> None:
    shape = Shape(4, 2, 16, 8, torch.bfloat16)
    step = in_bytes(make_step(shape, [random_row(shape, 41, index) for index in range(2)], [(40, 41), (0, 9)]))
    broken = run(shape, step).out
    for filling in (0x00, 0x7E, 0xFE):  # zero, the largest, the least
        caches = [cache.where(cache & 0x7F != 0x7F, filling) for cache in (step.key_cache, step.value_cache)]
        step.key_cache, step.value_cache = caches
        assert torch.equal(bits(run(shape, step).out), bits(broken))
        step = in_bytes(make_step(shape, [random_row(shape, 41, index) for index in range(2)], [(40, 41), (0, 9)]))


PARTS = [(0, 97), (299, 300), (130, 200), (32, 33), (449, 450)]


def error_of_8_bits(score_scale: float) -> tuple[float, float]:
    """Of attention over keys and values in e4m3 against float64 without: root mean square, and largest, both relative
    to the root mean square of the truth. In the numbers of tests/kernels/test_real_magnitudes.py."""
    shape = Shape(HEADS, KV_HEADS, HEAD_SIZE, 16, torch.float32)
    rows = [real_row(shape, end, seed) for seed, (_, end) in enumerate(PARTS)]
    for row in rows:
        row.qkv[:, :HEADS] *= score_scale
    step = in_bytes(make_step(shape, rows, PARTS, rotate=False))
    out, _, _ = twin(shape, step, Features(rotate=False))
    want = torch.cat([dense(row, first, end)[0] for row, (first, end) in zip(rows, PARTS, strict=True)])
    error, size = out.double() - want, want.square().mean().sqrt()
    return float(error.square().mean().sqrt() / size), float(error.abs().max() / size)


@pytest.mark.parametrize(("score_scale", "mean", "largest"), [(1.0, 0.3, 5.0), (0.1, 0.06, 0.6)])
def test_the_error_of_8_bits_is_as_docs_kernels_says(score_scale: float, mean: float, largest: float) -> None:
    found = error_of_8_bits(score_scale)
    assert mean / 2 < found[0] < mean, found
    assert found[1] < largest, found
