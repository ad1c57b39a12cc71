"""A norm and the product that follows it, in one call of the library: src/library.cpp's bulkhead_normed_product."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu.library import DTYPES, Library, NormArgs, pointer
from kernels.cpu.product import NativeProduct
from kernels.products import keeps_bits


class NativeNormedProduct:
    """See NormedProduct in kernels/products.py; weight [in] in the product's dtype. The bits are those of the two ops
    one after the other."""

    def __init__(self, library: Library, isa: int, weight: Tensor, epsilon: float, product: NativeProduct) -> None:
        assert weight.shape == (product.num_inputs,)
        assert weight.dtype == product.dtype
        self._library, self._isa = library, isa
        self._weight, self._product = weight, product
        args = NormArgs(weight=pointer(weight), size=len(weight), epsilon=epsilon, dtype=DTYPES[weight.dtype])
        self._norm = ctypes.byref(args)  # made once, as the product's

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        product, shape = self._product, x.shape
        assert shape[1:] == (product.num_inputs,)
        assert x.dtype == product.dtype
        total = torch.empty(shape, dtype=torch.float32) if residual is None else residual
        assert total.shape == shape
        assert total.dtype == torch.float32
        num_rows = shape[0]
        y = torch.empty((num_rows, product.num_outputs), dtype=product.out_dtype)
        at = pointer(total)
        self._library.normed_product(
            self._isa,
            self._norm,
            product.matrix,
            pointer(x),
            None if residual is None else at,
            at,
            y.data_ptr(),
            num_rows,
        )
        return y, total

    def is_exact(self) -> bool:
        """True by construction, and tried all the same."""
        return keeps_bits(lambda x: torch.cat(self(x), dim=1), self._product.num_inputs, self._product.dtype)
