"""Norm and activation against their twins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from kernels.gpu import silu_and_mul as silu_module
from kernels.gpu.rms_norm import norm_warps, rms_norm
from kernels.gpu.silu_and_mul import silu_and_mul
from tests.kernels.gpu.steps import DEVICE, close, few
from tests.kernels.native import bits

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@few
@given(
    num_tokens=st.integers(0, 3),
    size=st.sampled_from([1, 7, 64, 576]),
    dtype=DTYPES,
    add=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rms_norm(num_tokens: int, size: int, dtype: torch.dtype, add: bool, seed: int) -> None:
    x, weight = random((num_tokens, size), seed, dtype), random((size,), seed + 1, dtype)
    residual = random((num_tokens, size), seed + 2, torch.float32) if add else None
    want = reference.rms_norm(x, weight, 1e-5, residual)
    given_residual = None if residual is None else residual.clone().to(DEVICE)
    out, total = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5, given_residual)
    assert out.dtype == dtype
    assert total.dtype == torch.float32
    assert residual is None or total.data_ptr() == given_residual.data_ptr(), "the residual stream is one tensor"
    close(out.cpu(), want[0], dtype)
    close(total.cpu(), want[1], torch.float32)
    for row in range(num_tokens):
        kept = None if residual is None else residual[row : row + 1].clone().to(DEVICE)
        alone = rms_norm(x[row : row + 1].to(DEVICE), weight.to(DEVICE), 1e-5, kept)
        assert torch.equal(bits(alone[0].cpu()), bits(out[row : row + 1].cpu()))


@few
@given(
    num_tokens=st.integers(0, 3), size=st.sampled_from([1, 7, 1023, 1024, 1025]), dtype=DTYPES, seed=st.integers(0, 99)
)
def test_silu_and_mul(num_tokens: int, size: int, dtype: torch.dtype, seed: int) -> None:
    assert silu_module.BLOCK == 1024, "the sizes here are its edges"
    gate_up = random((num_tokens, 2 * size), seed, dtype)
    close(silu_and_mul(gate_up.to(DEVICE)).cpu(), reference.silu_and_mul(gate_up), dtype)


@pytest.mark.parametrize(("block", "warps"), [(64, 1), (1024, 1), (4096, 4), (8192, 8), (65536, 16)])
def test_the_order_of_a_norms_sum_comes_from_its_size(block: int, warps: int) -> None:
    assert norm_warps(block) == warps
