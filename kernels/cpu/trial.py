"""Whether an instruction set multiplies as it should on this machine, tried before it serves: a compiler, a hypervisor
or a processor may not do what its flags say. It takes some milliseconds.
"""

from functools import cache

import torch

from kernels.cpu.library import Library
from kernels.cpu.product import NativeProduct
from kernels.memory import Arena
from kernels.products import keeps_bits

SIZES = ((77, 45), (192, 96))  # inputs, outputs: ragged and whole
NUM_ROWS = 37
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@cache
def multiplies(library: Library, isa: int) -> bool:
    """Rows agree with float64 within the dtype's tolerance, and have the same bits alone and in company."""
    generator = torch.Generator().manual_seed(0)
    for num_inputs, num_outputs in SIZES:
        for dtype, tolerance in TOLERANCE.items():
            x = torch.randn((NUM_ROWS, num_inputs), generator=generator).to(dtype)
            weight = torch.randn((num_outputs, num_inputs), generator=generator).to(dtype)
            product = NativeProduct(library, isa, Arena(), weight)
            right = x.double() @ weight.double().T
            if not torch.allclose(product(x).double(), right, atol=tolerance, rtol=tolerance):
                return False
            if not keeps_bits(product, num_inputs, dtype):
                return False
    return True
