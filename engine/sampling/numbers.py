"""Of a step's logits as much as each row's sampling asks for, on the host.

Where the kernels computed them in the host's memory, all of them are there already. On a device they stay: one copy
brings each row's best token, or that its numbers broke, one more the largest of those rows that sample from their
top_k, and whole rows come only for those that need them. A token and its log probability are the same bits either way:
both are computed by engine/sampling/sampler.py, from the same numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.sampler import NOT_FINITE, WHOLE, Leaders
from engine.sampling.truncation import Few, largest

Top = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # kernels/reference.py


@dataclass(frozen=True, slots=True)
class Numbers:
    """One row's: ``values`` [V], or those that were asked for."""

    values: NDArray[np.float32] | Few
    found: Leaders


def numbers_of(logits: NDArray[np.float32], top: Top) -> list[Numbers]:
    """logits [S, V] in the host's memory. The best is found for all rows at once; who wants more of a row looks
    again."""
    rows = torch.from_numpy(logits)
    if not len(rows):
        return []
    best, finite = (found.numpy() for found in top(rows, 1))

    def ranked(index: int, count: int) -> NDArray[np.int64]:
        if count <= 0:
            return np.empty(0, dtype=np.int64)
        ids: NDArray[np.int64] = top(rows[index : index + 1], min(count, rows.shape[1]))[0][0].numpy()
        return ids

    first = np.where(finite, best[:, 0], NOT_FINITE).tolist()
    return [Numbers(logits[index], Leaders(one, partial(ranked, index))) for index, one in enumerate(first)]


def fetched(logits: Tensor, wanted: Sequence[int], top: Top) -> list[Numbers]:
    """logits [S, V] on a device; ``wanted`` [S]: how many of a row's largest, 0, or WHOLE. Of a row whose numbers broke
    nothing more is fetched."""
    num_rows, size = logits.shape
    if not num_rows:
        return []
    columns, finite = top(logits, 1)
    first: NDArray[np.int64] = torch.where(finite, columns[:, 0], NOT_FINITE).cpu().numpy()
    asked = np.where(first == NOT_FINITE, 0, np.array(wanted, dtype=np.int64))
    nothing = Few(size, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))
    numbers = [Numbers(nothing, Leaders(int(best), nothing.ranked)) for best in first]
    whole, some = np.flatnonzero(asked == WHOLE), np.flatnonzero(asked > 0)
    if len(whole):
        for index, values in zip(whole.tolist(), _rows(logits, whole).cpu().numpy(), strict=True):
            numbers[index] = Numbers(values, Leaders(int(first[index]), partial(largest, values)))
    if len(some):
        rows = _rows(logits, some)
        columns, _ = top(rows, int(asked[some].max()))
        ids, values = columns.cpu().numpy(), rows.gather(1, columns).cpu().numpy()
        for place, index in enumerate(some.tolist()):
            few = Few(size, ids[place, : asked[index]], values[place, : asked[index]])
            numbers[index] = Numbers(few, Leaders(int(first[index]), few.ranked))
    return numbers


def _rows(logits: Tensor, places: NDArray[np.int64]) -> Tensor:
    return logits if len(places) == len(logits) else logits[torch.from_numpy(places).to(logits.device)]
