"""A norm and the product after it in one call: the very bits of the two ops, and the same sum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.backend import Backend
from kernels.cpu.backend import NativeBackend
from kernels.cpu.normed import NativeNormedProduct
from kernels.products import NormThenProduct, Product
from kernels.torch_cpu import TorchBackend
from tests.kernels.native import bits, every_isa
from tests.kernels.test_products import DTYPES, matrices

EPSILON = 1e-5
ROW_COUNTS = [*range(1, 40), 127, 128, 129]


def two_calls(
    backend: Backend, norm: Tensor, product: Product, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    normed, total = backend.rms_norm(x, norm, EPSILON, None if residual is None else residual.clone())
    return product(normed), total


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", [(64, 96), (65, 39)])  # inputs, outputs: whole panels and ragged ones
def test_one_call_or_two_are_the_same_bits(isa: str, dtype: torch.dtype, gated: bool, sizes: tuple[int, int]) -> None:
    size, num_outputs = sizes
    x, weight, bias = matrices((size, num_outputs * (1 + gated)), dtype, max(ROW_COUNTS), 1)
    norm, sums = torch.randn(size).to(dtype), torch.randn(x.shape)
    for num_threads in (1, 2):
        backend = NativeBackend(isa, num_threads)
        product = (backend.gate_up if gated else backend.linear)(weight, bias)
        one = backend.normed(norm, EPSILON, product)
        assert isinstance(one, NativeNormedProduct)
        for count in ROW_COUNTS:
            for residual in (None, sums[:count]):
                want, want_total = two_calls(backend, norm, product, x[:count], residual)
                got, total = one(x[:count], None if residual is None else residual.clone())
                assert torch.equal(bits(got), bits(want)), f"{count} rows, {num_threads} threads"
                assert torch.equal(bits(total), bits(want_total))
        assert one.is_exact()


@every_isa
@given(
    size=st.integers(1, 70),
    num_outputs=st.integers(1, 70),
    num_rows=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    add=st.booleans(),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([1e-20, 1.0, 1e4, 1e18]),
)
def test_it_is_so_for_any_shape(
    isa: str,
    size: int,
    num_outputs: int,
    num_rows: list[int],
    dtype: torch.dtype,
    add: bool,
    seed: int,
    scale: float,
) -> None:
    """Several steps of other sizes, one after the other: the memory between norm and product is used again."""
    backend = NativeBackend(isa)
    x, weight, _ = matrices((size, num_outputs), dtype, max(num_rows), seed)
    x, norm, product = x * scale, torch.ones(size).to(dtype), backend.linear(weight)
    one = backend.normed(norm, EPSILON, product)
    for count in num_rows:
        residual = torch.randn((count, size)) if add else None
        want, want_total = two_calls(backend, norm, product, x[:count], residual)
        got, total = one(x[:count], residual)
        assert (got.dtype, got.shape) == (dtype, (count, num_outputs))
        assert torch.equal(bits(got), bits(want))
        assert torch.equal(bits(total), bits(want_total))
        assert residual is None or total is residual


@every_isa
def test_a_broken_number_stays_in_its_row(isa: str) -> None:
    x, weight, _ = matrices((33, 90), torch.bfloat16, 20, 2)
    x[2, 7] = torch.nan
    backend = NativeBackend(isa)
    out, total = backend.normed(torch.ones(33).bfloat16(), EPSILON, backend.linear(weight))(x)
    for found in (out.isnan().all(dim=1), total.isnan().any(dim=1)):
        assert found.nonzero().flatten().tolist() == [2]


@every_isa
def test_sizes_and_dtypes_are_checked(isa: str) -> None:
    backend = NativeBackend(isa)
    x, weight, _ = matrices((32, 8), torch.float32, 4, 3)
    product = backend.linear(weight)
    one = backend.normed(torch.ones(32), EPSILON, product)
    for bad_norm in (torch.ones(31), torch.ones(32).bfloat16()):
        with pytest.raises(AssertionError):
            backend.normed(bad_norm, EPSILON, product)
    bad = [(x[:, :31], None), (x.bfloat16(), None), (x, torch.zeros((3, 32))), (x, torch.zeros((4, 32)).bfloat16())]
    for bad_x, bad_residual in bad:
        with pytest.raises(AssertionError):
            one(bad_x, bad_residual)


def test_torchs_is_the_two_ops() -> None:
    x, weight, _ = matrices((12, 10), torch.float32, 3, 4)
    backend, norm = TorchBackend(), torch.randn(12)
    product = backend.linear(weight)
    one = backend.normed(norm, EPSILON, product)
    assert isinstance(one, NormThenProduct)
    want, want_total = two_calls(backend, norm, product, x, None)
    got, total = one(x)
    assert torch.equal(got, want)
    assert torch.equal(total, want_total)
    assert not one.is_exact()
