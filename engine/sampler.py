"""One token from one row of logits. Random numbers are a function of (seed, position) and of nothing else: no
generator is shared, so no neighbour, order or preemption can shift them.
"""

import numpy as np
from numpy.typing import NDArray

NOT_FINITE = -1  # in place of a token: this row's logits held NaN or infinity
TOP_P_FIRST_TOKENS = 512  # top_p seldom needs more; sorting the whole vocabulary is slow
_WORD = 2**64


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from Philox 4x64 (Salmon et al., SC 2011), keyed by seed and position."""
    return float(
        np.random.Generator(np.random.Philox(key=np.array([seed % _WORD, position], dtype=np.uint64))).random()
    )


def sample(logits: NDArray[np.float32], *, temperature: float, top_p: float, seed: int, position: int) -> int:
    """logits [V] -> token id, or NOT_FINITE. Temperature 0 takes the largest logit, the smallest id among equals."""
    best = int(logits.argmax())
    if not np.isfinite(logits).all():
        return NOT_FINITE
    if temperature == 0.0:
        return best
    weights = np.exp((logits.astype(np.float64) - float(logits[best])) / temperature)
    point = uniform(seed, position)
    if top_p >= 1.0:
        return _pick(weights.cumsum(), point)
    order, cumulative = _nucleus(weights, top_p)
    return int(order[_pick(cumulative, point)])


def _pick(cumulative: NDArray[np.float64], point: float) -> int:
    """The index whose share of the line 0..cumulative[-1] holds ``point``."""
    index = int(cumulative.searchsorted(point * cumulative[-1], side="right"))
    return min(index, len(cumulative) - 1)


def _nucleus(weights: NDArray[np.float64], top_p: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The fewest likeliest tokens that hold ``top_p`` of the weight (arXiv 1904.09751), and their cumulative weights.

    Equal weights are in order of id, so the result is a function of the weights alone.
    """
    wanted = top_p * weights.sum()
    for num_tokens in (TOP_P_FIRST_TOKENS, len(weights)):
        if num_tokens < len(weights):
            least = np.partition(weights, -num_tokens)[-num_tokens]
            candidates = np.flatnonzero(weights >= least)
        else:
            candidates = np.arange(len(weights))
        order = candidates[np.argsort(-weights[candidates], kind="stable")]
        cumulative = weights[order].cumsum()
        if cumulative[-1] >= wanted:
            break
    num_kept = min(int(cumulative.searchsorted(wanted, side="left")) + 1, len(order))
    return order[:num_kept], cumulative[:num_kept]
