"""Matrix products as a model sees them, plain torch's, and the trial of what exact isolation needs of any of them."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_ROWS_TRIED = 32

Norm = Callable[[Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]  # see reference.rms_norm


class Product(Protocol):
    """A matrix that was made ready once: x [T, in] -> [T, out]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def is_exact(self) -> bool:
        """Whether a row keeps all its bits alone, in any place and in any company."""
        ...


class NormedProduct(Protocol):
    """A norm's weight and a matrix, made ready once: reference.rms_norm of x [T, in] and the residual, and the product
    of what comes -> [T, out] and the sum float32 [T, in], for which the residual may be overwritten."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def is_exact(self) -> bool: ...


class Head(Product, Protocol):
    """x [T, in] -> logits float32 [T, out], whatever the dtype: a bfloat16 logit near 25 has steps of 0.125."""

    def rows(self, indices: Tensor) -> Tensor:
        """The matrix's own rows, int64 [T] -> [T, in] in its dtype: the embeddings of a model that ties the two."""
        ...


def keeps_bits(
    product: Callable[[Tensor], Tensor], num_inputs: int, dtype: torch.dtype, device: torch.device | None = None
) -> bool:
    """Tried on NUM_ROWS_TRIED random rows: alone, together, and together in another order."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((NUM_ROWS_TRIED, num_inputs), generator=generator).to(device, dtype)
    alone = torch.cat([product(rows[index : index + 1]) for index in range(NUM_ROWS_TRIED)])
    order = torch.randperm(NUM_ROWS_TRIED, generator=generator).to(device)
    return torch.equal(product(rows), alone) and torch.equal(product(rows[order]), alone[order])


class PlainProduct:
    """torch's own. It promises nothing about bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def is_exact(self) -> bool:
        return False


class Activated:
    """A product and an op on what comes, one after the other."""

    def __init__(self, product: Product, activate: Callable[[Tensor], Tensor]) -> None:
        self._product, self._activate = product, activate

    def __call__(self, x: Tensor) -> Tensor:
        return self._activate(self._product(x))

    def is_exact(self) -> bool:
        return self._product.is_exact()


class NormThenProduct:
    """The two ops one after the other: ``norm`` is a backend's rms_norm."""

    def __init__(self, norm: Norm, weight: Tensor, epsilon: float, product: Product) -> None:
        self._norm, self._weight, self._epsilon, self._product = norm, weight, epsilon, product

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        normed, total = self._norm(x, self._weight, self._epsilon, residual)
        return self._product(normed), total

    def is_exact(self) -> bool:
        return self._product.is_exact()


class PlainHead(PlainProduct):
    """Keeps the matrix twice: as it came for ``rows``, as float32 for the product."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.float())
        self._rows = weight

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x.float())

    def rows(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self._rows)
