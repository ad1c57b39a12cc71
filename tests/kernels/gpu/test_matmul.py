"""The matrix product against torch's, and the bits of its rows."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kernels.gpu.backend import TritonBackend
from kernels.gpu.matmul import BLOCK_K, BLOCK_M, BLOCK_N, TritonProduct, matmul
from tests.kernels.gpu.steps import DEVICE, close, few
from tests.kernels.native import bits

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@few
@given(
    num_rows=st.sampled_from([0, 1, BLOCK_M - 1, BLOCK_M, BLOCK_M + 1]),
    size=st.sampled_from([1, BLOCK_K - 1, BLOCK_K, BLOCK_K + 1, 2 * BLOCK_K]),
    num_outputs=st.sampled_from([1, BLOCK_N, BLOCK_N + 1]),
    dtype=DTYPES,
    is_head=st.booleans(),
    has_bias=st.booleans(),
)
def test_it_is_torchs_product(
    num_rows: int, size: int, num_outputs: int, dtype: torch.dtype, is_head: bool, has_bias: bool
) -> None:
    x = random((num_rows, size), 1, dtype)
    weight = random((num_outputs, size), 2, dtype)
    bias = random((num_outputs,), 3, dtype) if has_bias else None
    y = matmul(x.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE), head=is_head)
    assert y.dtype == (torch.float32 if is_head else dtype)
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    close(y.cpu() / size**0.5, want / size**0.5, y.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_are_its_own(dtype: torch.dtype) -> None:
    product = TritonProduct(random((70, 130), 2, dtype), None, DEVICE)
    x = random((BLOCK_M + 2, 130), 1, dtype).to(DEVICE)
    together = product(x).cpu()
    for row in (0, BLOCK_M - 1, BLOCK_M, BLOCK_M + 1):
        assert torch.equal(bits(product(x[row : row + 1]).cpu()), bits(together[row : row + 1]))
    assert torch.equal(bits(product(x.flip(0)).cpu()), bits(together.flip(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_not_rounded(dtype: torch.dtype) -> None:
    """A bfloat16 logit near 25 has steps of 0.125, and what lies between two steps would be a tie."""
    x, weight = random((3, 130), 1, dtype), random((70, 130), 2, dtype)
    logits = TritonBackend().head(weight)(x.to(DEVICE))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.cpu().double(), F.linear(x.double(), weight.double()), atol=1e-4, rtol=1e-5)


def test_embeddings_are_the_weights_rows() -> None:
    weight = random((9, 4), 0, torch.bfloat16)
    product = TritonProduct(weight, None, DEVICE)
    assert torch.equal(product.rows(torch.tensor([8, 0, 8]).to(DEVICE)).cpu(), weight[[8, 0, 8]])
