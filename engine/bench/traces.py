"""Requests as people and editors send them, with Poisson arrivals at a stated share of what the engine can do.

`chat`: prompts of some hundred tokens, answers whose length varies widely and differs between tenants; every client
asks for the same generous max_tokens. `code`: long prompts, short answers, short max_tokens. `mixed`: half the domains
do the one, half the other.
"""

import math
from dataclasses import dataclass

import numpy as np

from engine.bench.virtual_time import CONTEXT_MAX, MAX_NUM_SEQS, VOCAB_SIZE, Arrival, StepCost

NUM_DOMAINS = 4
TEMPERAMENTS = (0.4, 0.7, 1.0, 1.9)  # how long a domain's answers are, against the median of all


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal, cut at both ends."""

    median: int
    sigma: float
    largest: int

    def draw(self, random: np.random.Generator, factor: float = 1.0) -> int:
        return min(self.largest, max(1, round(factor * random.lognormal(math.log(self.median), self.sigma))))


@dataclass(frozen=True, slots=True)
class Kind:
    prompt: Lengths
    output: Lengths
    max_tokens: int


CHAT = Kind(prompt=Lengths(180, 0.8, 1_200), output=Lengths(110, 0.7, 512), max_tokens=512)
CODE = Kind(prompt=Lengths(600, 0.5, 2_000), output=Lengths(14, 0.7, 64), max_tokens=64)
TRACES: dict[str, tuple[Kind, ...]] = {"chat": (CHAT,) * 4, "code": (CODE,) * 4, "mixed": (CHAT, CODE, CHAT, CODE)}


def draw(trace: str, num_requests: int, *, load: float, cost: StepCost, seed: int) -> list[Arrival]:
    """``load``: offered work as a share of what full batches get through."""
    random = np.random.default_rng(seed)
    requests = []
    for index in range(num_requests):
        domain = int(random.integers(NUM_DOMAINS))
        kind = TRACES[trace][domain]
        # no two prompts begin alike, so none is found in the prefix cache: policies are compared, not caches
        prompt = np.concatenate(
            ([1 + index % (VOCAB_SIZE - 1)], random.integers(1, VOCAB_SIZE, kind.prompt.draw(random)))
        )
        requests.append((f"tenant-{domain}", prompt.tolist(), kind.output.draw(random, TEMPERAMENTS[domain]), kind))
    work_s = sum(_work_s(len(prompt), num_output, cost) for _, prompt, num_output, _ in requests)
    gaps_s = random.exponential(work_s / num_requests / load, num_requests)
    arrivals = []
    for at_s, (name, prompt, num_output, kind) in zip(np.cumsum(gaps_s).tolist(), requests, strict=True):
        assert len(prompt) + kind.max_tokens <= CONTEXT_MAX
        arrivals.append(Arrival(at_s, name, prompt, num_output, kind.max_tokens))
    return arrivals


def _work_s(num_prompt: int, num_output: int, cost: StepCost) -> float:
    """What a request adds to an engine whose batches are full: its tokens, its keys, its share of each step's start."""
    keys = num_output * (num_prompt + num_output / 2)
    return (num_prompt + num_output) * cost.token_s + keys * cost.key_s + num_output * cost.fixed_s / MAX_NUM_SEQS
