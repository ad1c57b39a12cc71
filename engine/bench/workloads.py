"""What a benchmark asks of the engine: jobs drawn from stated distributions, the same for the same seed.

Prompts are random token ids: no two begin alike, so the prefix cache finds nothing, and the time of a step does not
depend on what the ids are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PROMPT_TOKENS = (32, 512)  # smallest and largest, uniform
OUTPUT_TOKENS = (16, 128)  # the same, of workload "uniform"
LOG_NORMAL_MEDIAN = 48
LOG_NORMAL_P99 = 512  # which is the largest, too
_Z99 = 2.3263478740408408  # the 99th percentile of the standard normal distribution


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt, and how many tokens it gets (the end-of-text token is ignored)."""

    prompt_token_ids: list[int]
    num_output_tokens: int


def _uniform(random: np.random.Generator) -> int:
    return int(random.integers(OUTPUT_TOKENS[0], OUTPUT_TOKENS[1] + 1))


def _log_normal(random: np.random.Generator) -> int:
    sigma = math.log(LOG_NORMAL_P99 / LOG_NORMAL_MEDIAN) / _Z99
    return min(LOG_NORMAL_P99, max(1, round(random.lognormal(math.log(LOG_NORMAL_MEDIAN), sigma))))


WORKLOADS: dict[str, Callable[[np.random.Generator], int]] = {"uniform": _uniform, "log_normal": _log_normal}


def draw(workload: str, num_jobs: int, *, vocab_size: int, seed: int) -> list[Job]:
    """The first ``num_jobs`` of an endless list that (workload, vocab_size, seed) determine."""
    random = np.random.default_rng(seed)
    num_output_tokens = WORKLOADS[workload]
    jobs = []
    for _ in range(num_jobs):
        num_prompt_tokens = int(random.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1))
        prompt = random.integers(0, vocab_size, num_prompt_tokens).tolist()
        jobs.append(Job(prompt, num_output_tokens(random)))
    return jobs
