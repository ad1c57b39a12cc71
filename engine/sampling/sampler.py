"""One token from one row of logits, in this order (as vLLM's V1 sampler has it):

    1. what may come at all, biases, penalties    engine/sampling/adjustments.py
    2. temperature
    3. min_p, then top_k, then top_p              engine/sampling/truncation.py, each of what the last one left
    4. the draw, and the log probabilities of the distribution that was drawn from

Random numbers are a function of (seed, position) and of nothing else: no generator is shared, so no neighbour, order
or preemption can shift them. Among equal logits the smallest id comes first.
"""

from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from engine.events import KernelArrays
from engine.protocol import TokenLogprob
from engine.sampling.adjustments import adjusted
from engine.sampling.row import Row
from engine.sampling.truncation import Kept, largest, truncated

NOT_FINITE = -1  # in place of a token: this row's logits held NaN or infinity, or nothing was left to choose from
GREEDY_BELOW = 1e-5  # a lower temperature is greedy: it would be anyway, but for overflows on the way
_WORD = 2**64


@dataclass(frozen=True, slots=True)
class Pick:
    """``logprob`` is None where nobody asked for it, and where there is no token."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Picks:
    """A step's tokens [S], and the log probabilities of those rows that asked, by their index in it.

    ``scores``: of prompt tokens, by batch row; None where the numbers broke. ``arrays``: what the kernels were given,
    None where a model has none.
    """

    token_ids: NDArray[np.int64]
    logprobs: dict[int, TokenLogprob]
    scores: dict[int, tuple[TokenLogprob, ...] | None] = field(default_factory=dict)
    arrays: KernelArrays | None = None


BROKEN = Pick(NOT_FINITE)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from Philox 4x64 (Salmon et al., SC 2011), keyed by seed and position."""
    return float(
        np.random.Generator(np.random.Philox(key=np.array([seed % _WORD, position], dtype=np.uint64))).random()
    )


def pick(logits: NDArray[np.float32], row: Row, position: int) -> Pick:
    """logits [V] -> a token and, if asked for, its log probability and those of the likeliest."""
    best = int(logits.argmax())
    if not _finite(logits, best):
        return BROKEN
    sampling = row.sampling
    greedy = sampling.temperature < GREEDY_BELOW
    if greedy and row.plain and sampling.logprobs < 0:
        return Pick(best)
    values: NDArray[np.float32] | NDArray[np.float64] = logits
    if not row.plain:
        changed = adjusted(logits, row)
        if changed is None:
            return BROKEN
        values = changed
        best = int(values.argmax())
    scores = values.astype(np.float64)
    scores -= float(values[best])
    if greedy:
        if sampling.logprobs < 0:
            return Pick(best)
        return Pick(best, _logprob(best, values, scores, Kept(None, np.exp(scores).cumsum()), sampling.logprobs))
    scores /= sampling.temperature
    kept = truncated(values, np.exp(scores), top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    token_id = kept.at(uniform(sampling.seed, position))
    if sampling.logprobs < 0:
        return Pick(token_id)
    return Pick(token_id, _logprob(token_id, values, scores, kept, sampling.logprobs))


def scored(logits: NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprob | None:
    """logits [V] -> the log probability that the model gives this token, whatever it would sample; None where the
    numbers broke."""
    best = int(logits.argmax())
    if not _finite(logits, best):
        return None
    scores = logits.astype(np.float64)
    scores -= float(logits[best])
    told = _logprob(token_id, logits, scores, Kept(None, np.exp(scores).cumsum()), num_top)
    return replace(told, rank=1 + int(np.count_nonzero(logits > logits[token_id])))


def _finite(logits: NDArray[np.float32], best: int) -> bool:
    """``best``: the place of the largest, as argmax found it: argmax stops at a NaN."""
    return bool(np.isfinite(logits[best]) and np.isfinite(logits.min()))


def _logprob(
    token_id: int,
    values: NDArray[np.float32] | NDArray[np.float64],
    scores: NDArray[np.float64],
    kept: Kept,
    num_top: int,
) -> TokenLogprob:
    """``scores`` [V]: logarithms of weights, of which ``kept`` are in the distribution."""
    log_total = float(np.log(kept.cumulative[-1]))
    top = largest(values, num_top) if kept.ids is None else kept.ids[largest(values[kept.ids], num_top)]
    return TokenLogprob(
        token_id=token_id,
        logprob=float(scores[token_id]) - log_total,
        top=tuple((int(other), float(scores[other]) - log_total) for other in top if np.isfinite(scores[other])),
    )
