"""Matrix products whose rows do not depend on their company: every call has exactly SLAB rows.

A library's matrix product may sum in another order when the number of rows changes, and with it every row's last
bits. Here a call never has another number of rows: the rest is filled with zeros. That a row's bits then depend
neither on its place in the slab nor on the other rows is a property of the library, not of mathematics: `is_exact`
tries it on the matrices at hand, and a model that finds it wanting must call itself relaxed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.products import keeps_bits

SLAB = 16  # rows; part of what a bit is. 16 costs little more than 1 and wastes little of a full one


class SlabLinear:
    """weight [out, in], bias [out] or None; packed once where oneDNN takes the dtype. The weight is not kept then."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.num_inputs, self.num_outputs = weight.shape[1], weight.shape[0]
        self._bias = bias
        self._dtype = weight.dtype
        self._packed = False
        self._weight = weight
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            try:
                self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), SLAB)
                self._packed = True
                self._slab(torch.zeros((SLAB, self.num_inputs), dtype=weight.dtype))
            except RuntimeError:  # this processor or this build has no packed product for the dtype
                self._weight, self._packed = weight, False

    def _slab(self, x: Tensor) -> Tensor:
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        num_rows = len(x)
        if num_rows == SLAB:
            return self._slab(x)
        out = torch.empty((num_rows, self.num_outputs), dtype=self._dtype)
        for first in range(0, num_rows, SLAB):
            rows = x[first : first + SLAB]
            if len(rows) < SLAB:
                rows = F.pad(rows, (0, 0, 0, SLAB - len(rows)))
            out[first : first + SLAB] = self._slab(rows)[: num_rows - first]
        return out

    def is_exact(self) -> bool:
        """Tried on the matrix itself: nothing else can tell."""
        return keeps_bits(self, self.num_inputs, self._dtype)
