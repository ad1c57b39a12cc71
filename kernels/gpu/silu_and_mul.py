"""SwiGLU's activation (arXiv 2002.05202): gate_up [T, 2 * I] -> silu(gate) * up [T, I].

    silu(g) = g / (1 + exp(-g))

Each number for itself: nothing is summed. Twin: reference.silu_and_mul.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import check, options

BLOCK = 1024  # numbers of one program


@triton.jit
def silu_and_mul_kernel(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up_ptr + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * size + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 * I] of any float dtype -> [T, I] in its dtype."""
    num_tokens, width = gate_up.shape
    assert width % 2 == 0
    check(gate_up, (num_tokens, width))
    size = width // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        silu_and_mul_kernel[(num_tokens, triton.cdiv(size, BLOCK))](gate_up, out, size, BLOCK=BLOCK, **options())
    return out
