"""What changes a row's logits before temperature, in this order:

1. a grammar's mask         tokens that would break the wanted form cannot come
2. logit_bias               added
3. min_tokens               tokens that would end the answer cannot come yet; a grammar decides for itself
4. repetition_penalty       of tokens in prompt or answer: a positive logit is divided by it, another multiplied
                            (arXiv 1909.05858)
5. frequency_penalty        subtracted as often as a token is in the answer
6. presence_penalty         subtracted once if it is
"""

import numpy as np
from numpy.typing import NDArray

from engine.sampling.row import Row


def adjusted(logits: NDArray[np.float32], row: Row) -> NDArray[np.float64] | None:
    """logits [V], all finite -> what is sampled from; -inf is a token that cannot come. None: no token can."""
    values = logits.astype(np.float64)
    sampling = row.sampling
    if row.has_form:
        allowed = row.allowed(len(values))
        if allowed is None:
            return None
        values[~allowed] = -np.inf
    if row.has_bias:
        values[row.bias_ids] += row.bias_values
    if row.num_output_tokens < sampling.min_tokens and not row.has_form:
        values[row.end_ids] = -np.inf
    if row.has_penalties:
        seen, counts = row.tokens_seen(len(values))
        if sampling.repetition_penalty != 1.0:
            before = values[seen]
            factor = sampling.repetition_penalty
            values[seen] = np.where(before > 0, before / factor, before * factor)
        if sampling.frequency_penalty != 0.0:
            values -= sampling.frequency_penalty * counts
        if sampling.presence_penalty != 0.0:
            values[counts > 0] -= sampling.presence_penalty
    return values if np.isfinite(values.max()) else None
