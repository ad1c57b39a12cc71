"""The library's own matrix product: weights packed once, sums in one order whatever the number of rows.

The order (src/product.h) is by input, from the first to the last, so exactness is by construction; one row costs one
walk over the weights. Bits are promised per instruction set, like those of every other op.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import DTYPES, Library, ProductArgs, optional_pointer, pointer
from kernels.memory import Arena
from kernels.products import keeps_bits


def pack(weight: Tensor, panel: int, arena: Arena) -> Tensor:
    """weight [out, in] -> panels of ``panel`` columns, missing columns zero: float32 [panels, in, panel]; bfloat16
    [panels, in, panel / 2, 2], where the last axis holds columns i and i + panel / 2, low half first in memory."""
    num_outputs, num_inputs = weight.shape
    num_panels = -(-num_outputs // panel)
    weight = F.pad(weight, (0, 0, 0, num_panels * panel - num_outputs))
    if weight.dtype == torch.bfloat16:
        ordered = weight.view(num_panels, 2, panel // 2, num_inputs).permute(0, 3, 2, 1)
    else:
        ordered = weight.view(num_panels, panel, num_inputs).permute(0, 2, 1)
    return arena.empty(tuple(ordered.shape), weight.dtype).copy_(ordered)


class NativeProduct:
    """weight [out, in], bias [out] or None, both float32 or both bfloat16; the weight is not kept. Products are rounded
    once to the weight's dtype; a ``head`` takes and gives float32."""

    def __init__(
        self,
        library: Library,
        isa: int,
        arena: Arena,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        head: bool = False,
    ) -> None:
        assert bias is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1])
        self.num_outputs, self.num_inputs = weight.shape
        self._library, self._isa = library, isa
        self._panel = library.panel(isa)
        self._packed = pack(weight, self._panel, arena)
        self._bias = None if bias is None else bias.contiguous()
        self._dtype = torch.float32 if head else weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        assert x.shape[1:] == (self.num_inputs,)
        assert x.dtype == self._dtype
        y = torch.empty((len(x), self.num_outputs), dtype=self._dtype)
        args = ProductArgs(
            x=pointer(x),
            weight=pointer(self._packed),
            bias=optional_pointer(self._bias),
            y=pointer(y),
            num_rows=len(x),
            num_inputs=self.num_inputs,
            num_outputs=self.num_outputs,
            x_dtype=DTYPES[x.dtype],
            weight_dtype=DTYPES[self._packed.dtype],
            y_dtype=DTYPES[y.dtype],
        )
        self._library.product(self._isa, ctypes.byref(args))
        return y

    def rows(self, indices: Tensor) -> Tensor:
        """The weight's rows, unpacked again: int64 [T] -> [T, in]."""
        panel, column = indices // self._panel, indices % self._panel
        if self._packed.dim() == 3:
            return self._packed[panel, :, column]
        return self._packed[panel, :, column % (self._panel // 2), column // (self._panel // 2)]

    def is_exact(self) -> bool:
        """True by construction, and tried all the same: a compiler's mistake would show here."""
        return keeps_bits(self, self.num_inputs, self._dtype)
