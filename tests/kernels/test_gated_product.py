"""Gate, up and activation in one walk over the weights: the very bits of the product and the activation after it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from kernels.cpu.backend import NativeBackend
from kernels.torch_cpu import TorchBackend
from tests.kernels.native import bits, every_isa
from tests.kernels.test_products import DTYPES, matrices

ROW_COUNTS = [*range(1, 71), 127, 128, 129]


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 96), (65, 39)])  # inputs, columns of gate: whole panels and ragged ones
def test_one_walk_or_two_are_the_same_bits(isa: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    x, weight, bias = matrices((sizes[0], 2 * sizes[1]), dtype, max(ROW_COUNTS), 1)
    x *= 8  # gates far enough from zero that the exponential does not lie near one
    for with_bias in (None, bias):
        for num_threads in (1, 2):
            backend = NativeBackend(isa, num_threads)
            two, one = backend.linear(weight, with_bias), backend.gate_up(weight, with_bias)
            for count in ROW_COUNTS:
                want = backend.silu_and_mul(two(x[:count]))
                assert torch.equal(bits(one(x[:count])), bits(want)), f"{count} rows, {num_threads} threads"
            assert one.is_exact()


@every_isa
@given(
    num_inputs=st.integers(1, 70),
    size=st.integers(1, 70),
    num_rows=st.integers(0, 30),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([1e-30, 1.0, 30.0, 1e4, 1e30]),
)
def test_it_is_so_for_any_shape_and_size_of_numbers(
    isa: str,
    num_inputs: int,
    size: int,
    num_rows: int,
    dtype: torch.dtype,
    with_bias: bool,
    seed: int,
    scale: float,
) -> None:
    backend = NativeBackend(isa)
    x, weight, bias = matrices((num_inputs, 2 * size), dtype, num_rows, seed)
    x, some_bias = x * scale, bias if with_bias else None
    got = backend.gate_up(weight, some_bias)(x)
    assert (got.dtype, got.shape) == (dtype, (num_rows, size))
    assert torch.equal(bits(got), bits(backend.silu_and_mul(backend.linear(weight, some_bias)(x))))
    if scale == 1.0:
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        want = reference.silu_and_mul(
            torch.nn.functional.linear(x.float(), weight.float(), bias.float() if with_bias else None)
        )
        torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_number_stays_in_its_row(isa: str, dtype: torch.dtype) -> None:
    x, weight, _ = matrices((33, 90), dtype, 20, 2)
    x[2, 7] = torch.nan
    broken = NativeBackend(isa).gate_up(weight)(x).isnan()
    assert broken[2].all()
    broken[2] = False
    assert not broken.any()


def test_torchs_is_the_two_ops() -> None:
    x, weight, bias = matrices((12, 10), torch.float32, 3, 4)
    backend = TorchBackend()
    product = backend.gate_up(weight, bias)
    assert torch.equal(product(x), backend.silu_and_mul(backend.linear(weight, bias)(x)))
    assert not product.is_exact()
