"""Whether an instruction set multiplies as it should on this machine, tried before it serves: a compiler, a hypervisor
or a processor may not do what its flags say. It takes some milliseconds.
"""

from functools import cache

import torch

from kernels import reference
from kernels.cpu.library import Library
from kernels.cpu.product import NativeProduct
from kernels.memory import Arena
from kernels.products import keeps_bits

SIZES = ((77, 45), (192, 96))  # inputs, outputs: ragged and whole
NUM_ROWS = 37
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@cache
def multiplies(library: Library, isa: int) -> bool:
    """Rows agree with float64 within the dtype's tolerance, also where the product ends with an activation, and have
    the same bits alone and in company."""
    generator = torch.Generator().manual_seed(0)
    for num_inputs, num_outputs in SIZES:
        for dtype, tolerance in TOLERANCE.items():
            x = torch.randn((NUM_ROWS, num_inputs), generator=generator).to(dtype)
            weight = torch.randn((num_outputs, num_inputs), generator=generator).to(dtype)
            product = NativeProduct(library, isa, Arena(), weight)
            right = x.double() @ weight.double().T
            if not torch.allclose(product(x).double(), right, atol=tolerance, rtol=tolerance):
                return False
            halves = weight[: num_outputs // 2 * 2]
            gated = NativeProduct(library, isa, Arena(), halves, gated=True)
            activated = reference.silu_and_mul(NativeProduct(library, isa, Arena(), halves)(x))
            if not torch.allclose(gated(x).double(), activated.double(), atol=tolerance, rtol=tolerance):
                return False
            if not all(keeps_bits(one, num_inputs, dtype) for one in (product, gated)):
                return False
    return True
