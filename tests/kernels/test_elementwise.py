"""Norm, rope and activation against float64, both twins, both dtypes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference, torch_cpu

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("ops", [reference, torch_cpu], ids=["reference", "torch"])
@given(
    num_tokens=st.integers(0, 9),
    size=st.sampled_from([1, 7, 64]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
    add=st.booleans(),
)
def test_rms_norm(ops: object, num_tokens: int, size: int, dtype: torch.dtype, seed: int, add: bool) -> None:
    x, weight = random((num_tokens, size), seed, dtype), random((size,), seed + 1, dtype)
    residual = random((num_tokens, size), seed + 2, torch.float32) if add else None
    normed, total = ops.rms_norm(x, weight, 1e-5, residual)  # type: ignore[attr-defined]
    wide = x.double() + (residual.double() if residual is not None else 0)
    close(normed, wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double(), dtype)
    close(total, wide, torch.float32)
    assert normed.dtype == dtype
    assert total.dtype == torch.float32


@given(num_tokens=st.integers(1, 9), half=st.sampled_from([1, 4, 32]), dtype=DTYPES, seed=st.integers(0, 99))
def test_rope_turns_pairs_and_depends_on_distance_only(
    num_tokens: int, half: int, dtype: torch.dtype, seed: int
) -> None:
    x = random((num_tokens, 2, 2 * half), seed, dtype)
    angles = torch.arange(num_tokens)[:, None] * torch.linspace(1.0, 0.01, half)[None, :]
    turned = reference.rope(x, angles.cos(), angles.sin())
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    expected = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, :].to(torch.complex128)
    close(turned, torch.cat((expected.real, expected.imag), dim=-1), dtype)


@pytest.mark.parametrize("ops", [reference, torch_cpu], ids=["reference", "torch"])
@given(num_tokens=st.integers(0, 9), size=st.sampled_from([1, 5, 64]), dtype=DTYPES, seed=st.integers(0, 99))
def test_silu_and_mul(ops: object, num_tokens: int, size: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = random((num_tokens, 2 * size), seed, dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(ops.silu_and_mul(gate_up), gate * torch.sigmoid(gate) * up, dtype)  # type: ignore[attr-defined]


@given(num_tokens=st.integers(0, 9), size=st.sampled_from([1, 5, 64]), dtype=DTYPES, seed=st.integers(0, 99))
def test_gelu_and_mul(num_tokens: int, size: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = random((num_tokens, 2 * size), seed, dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(reference.gelu_and_mul(gate_up, tanh=False), gate * (1 + torch.erf(gate / 2**0.5)) / 2 * up, dtype)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    close(reference.gelu_and_mul(gate_up, tanh=True), gate * (1 + inner.tanh()) / 2 * up, dtype)
