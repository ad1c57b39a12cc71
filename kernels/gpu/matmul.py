"""Matrix product whose rows do not depend on their company: y = x W^T + bias.

One tile for every number of rows, one walk over K from the first term to the last, no split along K: a row's sums have
one order whatever the batch (https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference, 2025). It
costs speed where there are few rows; docs/kernels.md has the floor. Twin: torch.nn.functional.linear.

Rows beyond the last and terms beyond K are zeros. The sums are float32, and a head gives them as they are.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import check, is_interpreted, options
from kernels.products import keeps_bits

BLOCK_M, BLOCK_N, BLOCK_K = 16, 64, 64  # part of what a bit is
NUM_STAGES = 3
NUM_WARPS, NUM_WARPS_HEAD = 4, 8  # with four a head spills on one of the four architectures


@triton.jit
def matmul_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    y_ptr,  # [M, N]
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAST: tl.constexpr,
):
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    term = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * K + term[None, :]
    weight_at = weight_ptr + column.to(tl.int64)[None, :] * K + term[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_at + start, mask=(row < num_rows)[:, None] & (start + term < K)[None, :], other=0.0)
        weight = tl.load(weight_at + start, mask=(column < N)[None, :] & (start + term < K)[:, None], other=0.0)
        if CAST:  # the interpreter multiplies bfloat16 as if it were integers
            acc = tl.dot(x.to(tl.float32), weight.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, weight, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=(row < num_rows)[:, None] & (column < N)[None, :])


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, head: bool = False) -> Tensor:
    """x [M, K], weight [N, K], bias [N] or None, all of one dtype -> [M, N] in it; a ``head``'s in float32."""
    num_rows, size = x.shape
    num_outputs = len(weight)
    check(x, (num_rows, size))
    check(weight, (num_outputs, size), x)
    assert x.dtype == weight.dtype
    if bias is not None:
        check(bias, (num_outputs,), x)
    y = torch.empty((num_rows, num_outputs), dtype=torch.float32 if head else x.dtype, device=x.device)
    if num_rows:
        matmul_kernel[(triton.cdiv(num_outputs, BLOCK_N), triton.cdiv(num_rows, BLOCK_M))](
            x,
            weight,
            weight if bias is None else bias,
            y,
            num_rows,
            N=num_outputs,
            K=size,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            HAS_BIAS=bias is not None,
            CAST=is_interpreted(),
            **options(NUM_WARPS_HEAD if head else NUM_WARPS, NUM_STAGES),
        )
    return y


class TritonProduct:
    """weight [out, in], bias [out] or None, on the device. Products come in the weight's dtype, a ``head``'s in
    float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device, *, head: bool = False) -> None:
        self._head = head
        self._weight = weight.to(device).contiguous()
        self._bias = None if bias is None else bias.to(device).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        return matmul(x.contiguous(), self._weight, self._bias, head=self._head)

    def rows(self, indices: Tensor) -> Tensor:
        """int64 [T] -> [T, in] in the weight's dtype."""
        return F.embedding(indices, self._weight)

    def is_exact(self) -> bool:
        """True by construction, and tried all the same: a compiler's mistake would show here."""
        return keeps_bits(self, self._weight.shape[1], self._weight.dtype, self._weight.device)
