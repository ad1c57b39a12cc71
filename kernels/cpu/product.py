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


def pack(weight: Tensor, panel: int, bf16_inputs: int, arena: Arena) -> Tensor:
    """weight [out, in] -> panels of ``panel`` columns, missing columns zero.

    float32 [panels, in, panel]. bfloat16, where ``bf16_inputs`` is 1: [panels, in, panel / 2, 2], whose last axis holds
    columns i and i + panel / 2; else [panels, in / 2, panel, 2], whose last axis holds two inputs, filled with zeros
    to a multiple of ``bf16_inputs``.
    """
    num_outputs, num_inputs = weight.shape
    num_panels = -(-num_outputs // panel)
    missing = -num_inputs % bf16_inputs if weight.dtype == torch.bfloat16 else 0
    weight = F.pad(weight, (0, missing, 0, num_panels * panel - num_outputs))
    num_inputs += missing
    if weight.dtype == torch.float32:
        ordered = weight.view(num_panels, panel, num_inputs).permute(0, 2, 1)
    elif bf16_inputs == 1:
        ordered = weight.view(num_panels, 2, panel // 2, num_inputs).permute(0, 3, 2, 1)
    else:
        ordered = weight.view(num_panels, panel, num_inputs // 2, 2).permute(0, 2, 1, 3)
    return arena.empty(tuple(ordered.shape), weight.dtype).copy_(ordered)


def side_by_side(weight: Tensor, half: int) -> Tensor:
    """weight [2 * I, in], rows of gate and then of up -> [panels * 2 * half, in]: of each panel ``half`` rows of gate,
    then the same rows of up, missing ones zero."""
    size, num_inputs = weight.shape[0] // 2, weight.shape[1]
    padded = F.pad(weight.view(2, size, num_inputs), (0, 0, 0, -size % half))
    return padded.view(2, -1, half, num_inputs).transpose(0, 1).reshape(-1, num_inputs)


class NativeProduct:
    """weight [out, in], bias [out] or None, both float32 or both bfloat16; the weight is not kept. Products are rounded
    once to the weight's dtype; a ``head``'s stay float32. ``gated``: weight [2 * out, in] and bias [2 * out] are of
    gate and then of up, and silu(gate) * up comes, with the bits of the two ops one after the other (src/gated.h)."""

    def __init__(
        self,
        library: Library,
        isa: int,
        arena: Arena,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        head: bool = False,
        gated: bool = False,
    ) -> None:
        assert bias is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1])
        assert not (head and gated)
        self.num_outputs, self.num_inputs = weight.shape
        if gated:
            assert self.num_outputs % 2 == 0
            self.num_outputs //= 2
        self._library, self._isa = library, isa
        self._panel = library.panel(isa)
        self._bf16_inputs = library.bf16_inputs(isa)
        ordered = side_by_side(weight, self._panel // 2) if gated else weight
        self._packed = pack(ordered, self._panel, self._bf16_inputs, arena)
        self._bias = None if bias is None else bias.contiguous()
        self.dtype, self.out_dtype = weight.dtype, torch.float32 if head else weight.dtype
        args = ProductArgs(
            weight=pointer(self._packed),
            bias=optional_pointer(self._bias),
            num_inputs=self.num_inputs,
            num_outputs=self.num_outputs,
            weight_dtype=DTYPES[weight.dtype],
            y_dtype=DTYPES[self.out_dtype],
            gated=gated,
        )
        self.matrix = ctypes.byref(args)  # made once: a step calls every matrix of the model

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        assert x.shape[1:] == (self.num_inputs,)
        assert x.dtype == self.dtype
        num_rows = x.shape[0]
        y = torch.empty((num_rows, self.num_outputs), dtype=self.out_dtype)
        self._library.product(self._isa, self.matrix, pointer(x), pointer(y), num_rows)
        return y

    def rows(self, indices: Tensor) -> Tensor:
        """The weight's rows, unpacked again: int64 [T] -> [T, in]."""
        panel, column = indices // self._panel, indices % self._panel
        if self._packed.dim() == 3:
            return self._packed[panel, :, column]
        if self._bf16_inputs == 1:
            return self._packed[panel, :, column % (self._panel // 2), column // (self._panel // 2)]
        return self._packed[panel, :, column].flatten(1)[:, : self.num_inputs]

    def is_exact(self) -> bool:
        """True by construction, and tried all the same: a compiler's mistake would show here."""
        return keeps_bits(self, self.num_inputs, self.dtype)
