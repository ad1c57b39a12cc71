"""Which tokens a draw chooses from: min_p, then top_k, then top_p, each of what the last one left.

The order among tokens is that of their logits, the smallest id first among equals, so that the kept set is a function
of the row alone. The vocabulary is never sorted as a whole where a part of it will do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOP_P_TOKENS = (512, 4096)  # top_p seldom needs more; sorting the whole vocabulary is slow

Values = NDArray[np.float32] | NDArray[np.float64]
Ranked = Callable[[int], NDArray[np.int64]]  # count -> the ids of the count largest, as `largest` has them


@dataclass(frozen=True, slots=True)
class Few:
    """The largest of a row's ``size`` numbers. The others stayed where they are: whoever asks for one gets a
    KeyError."""

    size: int
    ids: NDArray[np.int64]  # the largest first
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, ids: Any) -> Any:
        asked = np.arange(self.size)[ids] if isinstance(ids, slice) else np.asarray(ids)
        is_it = asked[..., None] == self.ids
        if not is_it.any(axis=-1).all():
            raise KeyError(f"only the {len(self.ids)} largest of {self.size} numbers are here")
        return self.values[is_it.argmax(axis=-1)]

    def ranked(self, count: int) -> NDArray[np.int64]:
        if count > len(self.ids):
            raise KeyError(f"only the {len(self.ids)} largest of {self.size} numbers are here")
        return self.ids[:count]


@dataclass(frozen=True, slots=True)
class Kept:
    """Tokens in some fixed order, and their weights added up in it. ``ids`` None: all, in order of id."""

    ids: NDArray[np.int64] | None
    cumulative: NDArray[np.float64]

    def at(self, point: float) -> int:
        """The token whose share of the line 0..total holds ``point`` * total; ``point`` in [0, 1)."""
        total = self.cumulative[-1]
        index = int(self.cumulative.searchsorted(point * total, side="right"))
        if index == len(self.cumulative):  # rounded up to the very end: the last token with any weight
            index = int(self.cumulative.searchsorted(total, side="left"))
        return index if self.ids is None else int(self.ids[index])


def truncated(
    values: Values,
    weights: NDArray[np.float64],
    *,
    top_k: int,
    top_p: float,
    min_p: float,
    ranked: Ranked | None = None,
) -> Kept:
    """``values`` [V] give the order, ``weights`` [V] the shares; the largest weight is 1. ``top_k`` 0 keeps all.
    ``ranked`` finds the largest of ``values`` where somebody can sooner than ``largest``.

    top_p keeps the fewest likeliest tokens that hold that much of the weight (arXiv 1904.09751); min_p those with at
    least that part of the largest weight (arXiv 2407.01082).
    """
    ids: NDArray[np.int64] | None = None
    if min_p > 0.0:
        ids = np.flatnonzero(weights >= min_p)
        values, weights, ranked = values[ids], weights[ids], None
    if ranked is None:
        ranked = partial(largest, values)
    if 0 < top_k < len(values):
        order = ranked(top_k)
        kept = cut(weights[order], top_p)
        order = order[: len(kept)]
        return Kept(order if ids is None else ids[order], kept)
    if top_p >= 1.0:
        return Kept(ids, weights.cumsum())
    wanted = top_p * weights.sum()
    for num_tokens in (*TOP_P_TOKENS, len(values)):
        order = ranked(min(num_tokens, len(values)))
        cumulative = weights[order].cumsum()
        if cumulative[-1] >= wanted:
            break
    order = order[: _num_within(cumulative, wanted)]
    return Kept(order if ids is None else ids[order], cumulative[: len(order)])


def cut(weights: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Weights, the largest first, added up until they hold ``top_p`` of all of them."""
    cumulative: NDArray[np.float64] = weights.cumsum()
    return cumulative if top_p >= 1.0 else cumulative[: _num_within(cumulative, top_p * cumulative[-1])]


def largest(values: Values, count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest, the largest first; among equals the smallest index is larger."""
    size = len(values)
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    if count < size:
        least = np.partition(values, size - count)[size - count]
        above = np.flatnonzero(values > least)
        equal = np.flatnonzero(values == least)[: count - len(above)]
        indices = np.sort(np.concatenate((above, equal)))
    else:
        indices = np.arange(size)
    order: NDArray[np.int64] = indices[np.argsort(-values[indices], kind="stable")]
    return order


def _num_within(cumulative: NDArray[np.float64], wanted: float) -> int:
    return min(int(cumulative.searchsorted(wanted, side="left")) + 1, len(cumulative))
