"""A witness of the head: is each drawn token's logit what the head makes of its own row's hidden state?

    logit = scale * (h[0] * w[0] + ... + h[K-1] * w[K-1])        h: the row's hidden state, w: the token's row of W

is computed again, K products a row in float64, from a W that the auditor has read itself. So logits that change places
inside a launch, or belong to another token, are seen before anything leaves.

The bound is proven, not tuned. Whoever adds K products in float32, in any order, with or without fused multiply-adds,
is off by at most

    gamma(K) * (|h[0] * w[0]| + ... + |h[K-1] * w[K-1]|),    gamma(n) = n u / (1 - n u),    u = 2^-24

(Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1); a product of two bfloat16 numbers is exact.
The scale costs two roundings more, the sums here less than one: gamma(K + 4). Units that take what is smaller than
2^-126 for zero lose at most that for each product and sum, and that times the other factor for each input.

Not seen: logits that differ by less than the bound; a hidden state that was another's before the head got it; a token
that was chosen by something else than its own logits.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
UNIT = 2.0**-24  # half a step of float32
LEAST = 2.0**-126  # the least normal float32
NUM_MORE = 4  # roundings besides those of the sum


class HeadWitness:
    """``weight`` [V, K]: float32, float16, or uint16 which is bfloat16; ``is_bfloat16``: the model has it rounded to
    that. ``scale``: of the logits."""

    def __init__(self, weight: npt.NDArray[Any], *, is_bfloat16: bool, scale: float = 1.0) -> None:
        if weight.ndim != 2 or weight.dtype.str[1:] not in ("u2", "f2", "f4"):
            raise ValueError(f"the head's weight is {weight.dtype} of shape {weight.shape}")
        self._weight, self._scale = weight, scale
        self._is_bfloat16 = is_bfloat16
        self._ones = np.ones(weight.shape[1])
        self._rounds = is_bfloat16 and weight.dtype.kind == "f"
        num_roundings = weight.shape[1] + NUM_MORE
        self._gamma = num_roundings * UNIT / (1 - num_roundings * UNIT)

    def disagrees(self, hidden: npt.NDArray[Any], token_ids: npt.NDArray[np.int64], logits: FloatArray) -> BoolArray:
        """hidden [S, K], uint16 or float32, token_ids [S], logits [S] -> whose logit the head did not make. A token
        that the head does not know disagrees, and so does a number that is none."""
        size, num_inputs = self._weight.shape
        num_rows = len(token_ids)
        if hidden.shape != (num_rows, num_inputs) or logits.shape != (num_rows,):
            return np.ones(num_rows, np.bool_)
        known = (token_ids >= 0) & (token_ids < size)
        rows = wide(self._weight[np.where(known, token_ids, 0)])
        if self._rounds:
            rows = rounded(rows)
        states = wide(hidden)
        # A product of two numbers of 8 bits has its place in float32.
        products = (states * rows).astype(np.float64) if self._is_bfloat16 else states.astype(np.float64) * rows
        sums = products @ self._ones
        np.abs(products, out=products)
        largest = sum(max(float(part.max(initial=0.0)), -float(part.min(initial=0.0))) for part in (states, rows))
        bound = self._gamma * (products @ self._ones) + LEAST * num_inputs * (2.0 + largest)
        agrees = np.abs(logits - self._scale * sums) <= abs(self._scale) * bound + LEAST
        disagree: BoolArray = ~(known & agrees)
        return disagree


def wide(values: npt.NDArray[Any]) -> FloatArray:
    """float32 from bfloat16 bits, or from a narrower float; exact."""
    if values.dtype.kind != "u":
        return values.astype(np.float32, copy=False)
    widened: FloatArray = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return widened


def rounded(values: FloatArray) -> FloatArray:
    """To the nearest bfloat16, ties to even, as float32."""
    bits = values.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (nearest & np.uint32(0xFFFF0000)).view(np.float32)
