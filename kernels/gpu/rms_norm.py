"""Root mean square norm with an optional residual added first (arXiv 1910.07467).

    total = x + residual
    out = total * rsqrt(mean(total^2) + epsilon) * weight

One program for each row, one sum over the whole row: its order depends on the size alone, so a row's bits do not
depend on its company. Twin: reference.rms_norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import check, options, power_of_two


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [T, SIZE]
    weight_ptr,  # [SIZE]
    residual_ptr,  # float32 [T, SIZE]
    total_ptr,  # float32 [T, SIZE], may be residual_ptr
    out_ptr,  # [T, SIZE] in weight's dtype
    epsilon,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    at = row * SIZE + column
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0)
    mean = tl.sum(total * total, axis=0) / SIZE
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out = total * tl.rsqrt(mean + epsilon) * weight
    tl.store(total_ptr + at, total, mask=inside)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [T, H] of any float dtype, weight [H], residual float32 [T, H] or None, which is overwritten -> (normed [T, H]
    in weight's dtype, x + residual float32 [T, H])."""
    num_tokens, size = x.shape
    check(x, (num_tokens, size))
    check(weight, (size,), x)
    total = torch.empty((num_tokens, size), dtype=torch.float32, device=x.device) if residual is None else residual
    check(total, (num_tokens, size), x)
    assert total.dtype == torch.float32
    out = torch.empty((num_tokens, size), dtype=weight.dtype, device=x.device)
    if num_tokens:
        block = power_of_two(size)
        rms_norm_kernel[(num_tokens,)](
            x,
            weight,
            total,
            total,
            out,
            epsilon,
            SIZE=size,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            **options(num_warps=norm_warps(block)),
        )
    return out, total


def norm_warps(block: int) -> int:
    """32 numbers for each thread at most: part of the order of the sum, so by the size alone."""
    return max(1, min(16, block // 1024))
