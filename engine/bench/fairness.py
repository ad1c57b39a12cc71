"""What a flood of one tenant costs the others. In virtual time, see virtual_time.py.

`domains` tenants always have more waiting than a step admits; the first of them floods: ten times as many requests, of
longer prompts. One more tenant is quiet: it sends one short request now and then, from when the flood is there.

gap_tokens_max       the most by which what two backlogged domains were served, over any time, differs
bound_tokens         what VTC promises for it (arXiv 2401.00588, theorem 4.4): twice the tokens that may be in work
jain                 Jain's index of what the backlogged domains were served: 1 is equal, 1/domains is one for all
quiet_ttft_p99_ratio the quiet domain's 99th percentile of TTFT against the same requests with nobody else there; of
                     that, each by itself as a 99th percentile against the same number:
  quiet_rest_ratio   the rest of the step that was under way when the request came, at a random moment of it
  quiet_queue_ratio  from then on until the first step with a token of it
  quiet_read_ratio   from then on until its first token
throughput_ratio     tokens per second against `fcfs` under the same load, prompts unbounded. Under `fcfs` nearly all of
                     what is served is the flood's long prompts, which share a step's fixed cost among more tokens
equal_lengths_throughput_ratio  the same where the flood's prompts are as long as the others': what order alone costs
tokens_lost_ratio    tokens of steps that were broken off (engine/scheduling/break_off.py) against those of all others

`fair` has a row with steps broken off and one without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bench.timeline import percentile
from engine.bench.virtual_time import BLOCK_SIZE, NUM_BLOCKS, VOCAB_SIZE, Arrival, Served, StepCost, VirtualEngine

NUM_WAITING = 4  # that each backlogged domain always has
FLOOD_FACTOR = 10
PROMPT_TOKENS = (64, 256)  # of the backlogged domains, uniform
FLOOD_PROMPT_TOKENS = (256, 768)
OUTPUT_TOKENS = (16, 128)
QUIET_PROMPT_TOKENS, QUIET_OUTPUT_TOKENS = 64, 32
QUIET_EVERY_STEPS = 40
QUIET = "quiet"


@dataclass(frozen=True, slots=True)
class Load:
    """One run: what is offered, at what cost, for how long."""

    num_domains: int
    num_steps: int
    cost: StepCost
    seed: int
    max_prompt_tokens: int = 0  # engine/config.py
    break_off_percent: int = 0  # engine/config.py
    equal_lengths: bool = False  # the flood's prompts are as long as the others'


class Flood:
    """Keeps every domain's line as long as it is to be. With no domain at all it does nothing."""

    def __init__(self, engine: VirtualEngine, load: Load) -> None:
        self.engine = engine
        self.names = [f"tenant-{index:02d}" for index in range(load.num_domains)]
        self._prompt_tokens = PROMPT_TOKENS if load.equal_lengths else FLOOD_PROMPT_TOKENS
        self._random = np.random.default_rng(load.seed)
        self._num_made = 0

    def refill(self) -> None:
        waiting = [sequence.domain for sequence in self.engine.core.scheduler.waiting]
        for index, name in enumerate(self.names):
            wanted = NUM_WAITING * (FLOOD_FACTOR if index == 0 else 1)
            for _ in range(wanted - waiting.count(name)):
                self._submit(name, PROMPT_TOKENS if index else self._prompt_tokens)

    def _submit(self, name: str, prompt_tokens: tuple[int, int]) -> None:
        num_output = int(self._random.integers(OUTPUT_TOKENS[0], OUTPUT_TOKENS[1] + 1))
        num_prompt = int(self._random.integers(prompt_tokens[0], prompt_tokens[1] + 1))
        self._num_made += 1
        prompt = _prompt(self._num_made, num_prompt)
        self.engine.submit(Arrival(self.engine.runner.now_s, name, prompt, num_output, num_output))


def rows(
    policies: Sequence[str],
    domain_counts: Sequence[int],
    *,
    num_steps: int,
    cost: StepCost,
    seed: int,
    max_prompt_tokens: int = 0,
    break_off_percent: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    alone_s = _p99(run(policies[0], Load(0, num_steps, cost, seed))[0], lambda one: one.timeline.ttft_s)
    found = []
    for num_domains in domain_counts:
        load = Load(num_domains, num_steps, cost, seed, max_prompt_tokens)
        fcfs_rates = [_rate(run("fcfs", replace(one, max_prompt_tokens=0))[0]) for one in _both(load)]
        for policy in policies:
            for percent in dict.fromkeys((0, break_off_percent if policy == "fair" else 0)):
                progress(f"fairness: {num_domains} domains, {policy}, {percent} % for breaking off")
                found.append(_row(policy, replace(load, break_off_percent=percent), alone_s, fcfs_rates))
    return found


def _both(load: Load) -> tuple[Load, Load]:
    return load, replace(load, equal_lengths=True)


def _row(policy: str, load: Load, alone_s: float, fcfs_rates: Sequence[float]) -> dict[str, Any]:
    engine, history = run(policy, load)
    core = engine.core
    ttft_s = _p99(engine, lambda one: one.timeline.ttft_s)
    return {
        "policy": policy,
        "domains": load.num_domains,
        "break_off_percent": load.break_off_percent,
        "gap_tokens_max": widest_gap(history),
        "bound_tokens": 2 * NUM_BLOCKS * BLOCK_SIZE,
        "jain": round(jain(history[-1] - history[0]), 4),
        "quiet_ttft_p99_s": float(f"{ttft_s:.4g}"),
        "quiet_ttft_p99_ratio": round(ttft_s / alone_s, 3),
        "quiet_rest_ratio": round(_p99(engine, lambda one: one.rest_s) / alone_s, 3),
        "quiet_queue_ratio": round(_p99(engine, lambda one: one.queue_s) / alone_s, 3),
        "quiet_read_ratio": round(_p99(engine, lambda one: one.read_s) / alone_s, 3),
        "throughput_ratio": round(_rate(engine) / fcfs_rates[0], 4),
        "equal_lengths_throughput_ratio": round(_rate(run(policy, _both(load)[1])[0]) / fcfs_rates[1], 4),
        "steps_broken_off": core.break_offs.num_broken_off,
        "tokens_lost_ratio": round(core.break_offs.num_tokens_lost / core.stats().num_batch_tokens, 5),
        "max_prompt_tokens": load.max_prompt_tokens,
    }


def run(policy: str, load: Load) -> tuple[VirtualEngine, NDArray[np.int64]]:
    """The engine after the run, and what each backlogged domain had been served after each step [steps, domains]."""
    engine = VirtualEngine(
        load.cost, policy, max_prompt_tokens=load.max_prompt_tokens, break_off_percent=load.break_off_percent
    )
    flood = Flood(engine, load)
    moments = np.random.default_rng([load.seed, 1])
    history = np.zeros((load.num_steps, load.num_domains), dtype=np.int64)
    for step in range(load.num_steps):
        flood.refill()
        if step and step % QUIET_EVERY_STEPS == 0:
            _visit(engine, _prompt(-1 - step, QUIET_PROMPT_TOKENS), float(moments.random()))
        if engine.core.has_work:
            engine.step()
        history[step] = [engine.tokens[name] for name in flood.names]
    return engine, history


def _visit(engine: VirtualEngine, prompt: list[int], moment: float) -> None:
    """The quiet domain's next request comes at this moment of the next step, or now where there is nothing to do."""
    runner = engine.runner

    def arrive(after_s: float) -> None:
        arrival = Arrival(runner.now_s + after_s, QUIET, prompt, QUIET_OUTPUT_TOKENS, QUIET_OUTPUT_TOKENS)
        runner.at_launch = lambda step_s: None
        engine.coming.append(arrival)

    if engine.core.has_work:
        runner.at_launch = lambda step_s: arrive(moment * step_s)
    else:
        arrive(0.0)
        engine.submit(engine.coming.popleft())


def _prompt(number: int, num_tokens: int) -> list[int]:
    """No two numbers' prompts begin alike."""
    return [number % VOCAB_SIZE, abs(number) // VOCAB_SIZE % VOCAB_SIZE, *([1] * (num_tokens - 2))]


def _rate(engine: VirtualEngine) -> float:
    return engine.tokens.total() / engine.runner.now_s


def _p99(engine: VirtualEngine, seconds: Callable[[Served], float]) -> float:
    """Of the quiet domain's requests that have their first token."""
    answered = [one for one in engine.served.values() if one.arrival.domain == QUIET and one.timeline.token_times_s]
    return percentile([seconds(one) for one in answered], 99)


def widest_gap(history: NDArray[np.int64]) -> int:
    """Over all pairs of domains and all stretches of time, the largest difference of what they were served in it."""
    differences = (history[:, a] - history[:, b] for a, b in combinations(range(history.shape[1]), 2))
    return max((int(d.max() - d.min()) for d in differences), default=0)


def jain(served: NDArray[np.int64]) -> float:
    """(sum x)^2 / (n * sum x^2), Jain, Chiu and Hawe 1984."""
    total = float(served.sum())
    return total * total / (len(served) * float((served.astype(np.float64) ** 2).sum())) if total else 0.0
