"""One token from one row of logits, in this order (as vLLM's V1 sampler has it):

    1. what may come at all, biases, penalties    engine/sampling/adjustments.py
    2. temperature
    3. min_p, then top_k, then top_p              engine/sampling/truncation.py, each of what the last one left
    4. the draw, and the log probabilities of the distribution that was drawn from

Random numbers are a function of (seed, position) and of nothing else: no generator is shared, so no neighbour, order
or preemption can shift them. Among equal logits the smallest id comes first.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from engine.events import HeadWork, KernelArrays
from engine.protocol import TokenLogprob
from engine.sampling.adjustments import adjusted
from engine.sampling.row import Row
from engine.sampling.truncation import Few, Kept, Ranked, Values, cut, largest, truncated

NOT_FINITE = -1  # in place of a token: this row's logits held NaN or infinity, or nothing was left to choose from
WHOLE = -1  # all of a row's numbers
GREEDY_BELOW = 1e-5  # a lower temperature is greedy: it would be anyway, but for overflows on the way
ALL = slice(None)
_WORD = 2**64


@dataclass(frozen=True, slots=True)
class Pick:
    """``logprob`` is None where nobody asked for it, and where there is no token. ``logit``: the token's, as it was
    before anything changed it; NaN where it is not in the host's memory."""

    token_id: int
    logprob: TokenLogprob | None = None
    logit: float = math.nan


@dataclass(frozen=True, slots=True)
class Picks:
    """A step's tokens [S], and the log probabilities of those rows that asked, by their index in it.

    ``scores``: of prompt tokens, by batch row; None where the numbers broke. ``arrays``: what the kernels were given,
    None where a model has none. ``head``: None where the model does not show what its head was given.
    """

    token_ids: NDArray[np.int64]
    logprobs: dict[int, TokenLogprob]
    scores: dict[int, tuple[TokenLogprob, ...] | None] = field(default_factory=dict)
    arrays: KernelArrays | None = None
    head: HeadWork | None = None


BROKEN = Pick(NOT_FINITE)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from Philox 4x64 (Salmon et al., SC 2011), keyed by seed and position."""
    return float(
        np.random.Generator(np.random.Philox(key=np.array([seed % _WORD, position], dtype=np.uint64))).random()
    )


@dataclass(frozen=True, slots=True)
class Leaders:
    """The largest of a row's logits, as the kernels or numpy find them. ``best``: the first, NOT_FINITE where the row
    holds a NaN or an infinity; then ``ranked`` is not asked."""

    best: int
    ranked: Ranked


def leaders(logits: NDArray[np.float32]) -> Leaders:
    best = int(logits.argmax())  # stops at a NaN
    finite = np.isfinite(logits[best]) and np.isfinite(logits.min())
    return Leaders(best if finite else NOT_FINITE, partial(largest, logits))


def asks_for(row: Row, size: int) -> int:
    """How many of the largest of a row's ``size`` numbers `pick` looks at, if the best is known: none, those of top_k,
    or WHOLE."""
    sampling = row.sampling
    if not row.plain:
        return WHOLE
    if sampling.temperature < GREEDY_BELOW:
        return 0 if sampling.logprobs < 0 else WHOLE
    return sampling.top_k if 0 < sampling.top_k < size and sampling.min_p == 0.0 else WHOLE


def pick(logits: NDArray[np.float32] | Few, row: Row, position: int, found: Leaders | None = None) -> Pick:
    """logits [V], or as many as the row asks for -> a token and, if asked for, its log probability and those of the
    likeliest. ``found`` None: looked for here."""
    if found is None:
        assert not isinstance(logits, Few)
        found = leaders(logits)
    best, ranked = found.best, found.ranked
    if best == NOT_FINITE:
        return BROKEN
    sampling = row.sampling
    greedy = sampling.temperature < GREEDY_BELOW
    if greedy and row.plain and sampling.logprobs < 0:
        return _pick(logits, best)
    values: Values | Few = logits
    if not row.plain:
        assert not isinstance(logits, Few)
        changed = adjusted(logits, row)
        if changed is None:
            return BROKEN
        values, best, ranked = changed, int(changed.argmax()), partial(largest, changed)
    scale = _Scale(values, best, 1.0 if greedy else sampling.temperature)
    if greedy:
        if sampling.logprobs < 0:
            return _pick(logits, best)
        return _pick(logits, best, _logprob(best, scale, _all(scale), ranked, sampling.logprobs))
    if 0 < sampling.top_k < len(values) and sampling.min_p == 0.0:  # nobody else's weight matters
        ids = ranked(sampling.top_k)
        cumulative = cut(np.exp(scale.scores(ids)), sampling.top_p)
        kept = Kept(ids[: len(cumulative)], cumulative)
    else:
        assert not isinstance(values, Few)
        weights = np.exp(scale.scores())
        how = {"top_p": sampling.top_p, "min_p": sampling.min_p}
        kept = truncated(values, weights, top_k=sampling.top_k, ranked=ranked, **how)
    token_id = kept.at(uniform(sampling.seed, position))
    if sampling.logprobs < 0:
        return _pick(logits, token_id)
    return _pick(logits, token_id, _logprob(token_id, scale, kept, ranked, sampling.logprobs))


def _pick(logits: NDArray[np.float32] | Few, token_id: int, logprob: TokenLogprob | None = None) -> Pick:
    return Pick(token_id, logprob, math.nan if isinstance(logits, Few) else float(logits[token_id]))


def scored(
    logits: NDArray[np.float32] | Few, token_id: int, num_top: int, found: Leaders | None = None
) -> TokenLogprob | None:
    """logits [V] -> the log probability that the model gives this token, whatever it would sample; None where the
    numbers broke."""
    if found is None:
        assert not isinstance(logits, Few)
        found = leaders(logits)
    if found.best == NOT_FINITE:
        return None
    assert not isinstance(logits, Few)
    scale = _Scale(logits, found.best, 1.0)
    told = _logprob(token_id, scale, _all(scale), found.ranked, num_top)
    return replace(told, rank=1 + int(np.count_nonzero(logits > logits[token_id])))


@dataclass(frozen=True, slots=True)
class _Scale:
    """Logarithms of weights, the best token's 0, computed for as many tokens as are asked about."""

    values: Values | Few
    best: int
    temperature: float

    def scores(self, ids: NDArray[np.int64] | slice = ALL) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = self.values[ids].astype(np.float64)
        scores -= float(self.values[self.best])
        scores /= self.temperature
        return scores


def _all(scale: _Scale) -> Kept:
    return Kept(None, np.exp(scale.scores()).cumsum())


def _logprob(token_id: int, scale: _Scale, kept: Kept, ranked: Ranked, num_top: int) -> TokenLogprob:
    """Of the distribution over ``kept``."""
    log_total = float(np.log(kept.cumulative[-1]))
    top = ranked(num_top) if kept.ids is None else kept.ids[largest(scale.values[kept.ids], num_top)]
    scores = scale.scores(np.append(top, token_id)) - log_total
    return TokenLogprob(
        token_id=token_id,
        logprob=float(scores[-1]),
        top=tuple(
            (int(other), float(score)) for other, score in zip(top, scores[:-1], strict=True) if np.isfinite(score)
        ),
    )
