"""The specification of sampling in plain Python: slow, short, one list for each stage. It shares no code with
engine/sampling/sampler.py; numbers are Python floats, that is float64."""

import math

from engine.protocol import SamplingParams


def adjusted(
    logits: list[float], sampling: SamplingParams, prompt: list[int], output: list[int], end_ids: set[int]
) -> list[float]:
    """What temperature is applied to; -inf is a token that cannot come."""
    values = list(logits)
    for token_id, bias in sampling.logit_bias:
        values[token_id] += bias
    if len(output) < sampling.min_tokens:
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else end_ids)
        for token_id in ends:
            values[token_id] = -math.inf
    for token_id in set(prompt) | set(output):
        value, factor = values[token_id], sampling.repetition_penalty
        values[token_id] = value / factor if value > 0 else value * factor
    for token_id in set(output):
        values[token_id] -= sampling.frequency_penalty * output.count(token_id)
        values[token_id] -= sampling.presence_penalty
    return values


def in_order(values: list[float]) -> list[int]:
    """Token ids, the likeliest first, the smallest id first among equals."""
    return sorted(range(len(values)), key=lambda token_id: (-values[token_id], token_id))


def weights_of(values: list[float], temperature: float) -> list[float]:
    best = max(values)
    return [math.exp((value - best) / temperature) for value in values]


def kept(values: list[float], temperature: float, *, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The tokens that may be drawn, the likeliest first."""
    weights = weights_of(values, temperature)
    ids = [token_id for token_id in in_order(values) if values[token_id] > -math.inf]
    if min_p > 0:
        ids = [token_id for token_id in ids if weights[token_id] >= min_p * max(weights)]
    if top_k > 0:
        ids = ids[:top_k]
    if top_p < 1:
        total, held, few = math.fsum(weights[token_id] for token_id in ids), 0.0, []
        for token_id in ids:
            if held >= top_p * total:
                break
            few.append(token_id)
            held += weights[token_id]
        ids = few
    return ids


def logprobs(values: list[float], temperature: float, ids: list[int]) -> dict[int, float]:
    """Log probabilities of the tokens `ids`, which are all that may be drawn."""
    best = max(values)
    log_total = math.log(math.fsum(math.exp((values[token_id] - best) / temperature) for token_id in ids))
    return {token_id: (values[token_id] - best) / temperature - log_total for token_id in ids}
