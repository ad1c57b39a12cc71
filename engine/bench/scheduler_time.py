"""What scheduling costs in Python: the real scheduler and block pool with all rows taken and a long line, step by step,
timed by the processor's clock. Nothing is computed, so whatever a step takes here the model has to wait for.

schedule_p50_ms  one call of Scheduler.schedule: who runs, who enters, whose blocks; and its 95th percentile
step_p50_ms      the whole step without the model: schedule, arrays, counters, texts, endings; and its 95th percentile
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.bench.timeline import percentile
from engine.bench.virtual_time import MAX_NUM_SEQS, VOCAB_SIZE, Arrival, StepCost, VirtualEngine
from engine.scheduling.schedule import Schedule

NUM_WAITING = 200
NUM_DOMAINS = 8
PROMPT_TOKENS = (32, 512)
OUTPUT_TOKENS = (16, 128)
WARM_STEPS = 100  # until rows are at different places of their answers
COST = StepCost(fixed_s=0.02, token_s=0.001, key_s=0.0)  # moves the virtual clock and nothing else


def rows(
    policies: Sequence[str],
    *,
    num_steps: int,
    seed: int,
    now: Callable[[], float],
    num_waiting: int = NUM_WAITING,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """``now`` in seconds. One row for each policy."""
    found = []
    for policy in policies:
        progress(f"scheduler: {policy}")
        found.append(_row(policy, num_steps, num_waiting, seed, now))
    return found


def _row(policy: str, num_steps: int, num_waiting: int, seed: int, now: Callable[[], float]) -> dict[str, Any]:
    engine = VirtualEngine(COST, policy)
    random = np.random.default_rng(seed)
    scheduler = engine.core.scheduler
    schedule = scheduler.schedule
    schedule_s: list[float] = []
    step_s: list[float] = []
    num_running: list[int] = []

    def timed() -> Schedule:
        began_s = now()
        plan = schedule()
        schedule_s.append(now() - began_s)
        return plan

    scheduler.schedule = timed  # type: ignore[method-assign]
    for _ in range(WARM_STEPS + num_steps):
        while len(scheduler.waiting) < num_waiting:
            engine.submit(_draw(engine.runner.now_s, len(engine.served), random))
        began_s = now()
        engine.step()
        step_s.append(now() - began_s)
        num_running.append(len(scheduler.running))
    figures = {
        "schedule_p50_ms": statistics.median(schedule_s[WARM_STEPS:]) * 1_000,
        "schedule_p95_ms": percentile(schedule_s[WARM_STEPS:], 95) * 1_000,
        "step_p50_ms": statistics.median(step_s[WARM_STEPS:]) * 1_000,
        "step_p95_ms": percentile(step_s[WARM_STEPS:], 95) * 1_000,
    }
    return {
        "policy": policy,
        "num_steps": num_steps,
        "num_rows_max": MAX_NUM_SEQS,
        "num_running_mean": round(statistics.mean(num_running[WARM_STEPS:]), 1),
        "num_waiting": num_waiting,
        **{name: round(value, 4) for name, value in figures.items()},
    }


def _draw(now_s: float, number: int, random: np.random.Generator) -> Arrival:
    num_prompt = int(random.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1))
    num_output = int(random.integers(OUTPUT_TOKENS[0], OUTPUT_TOKENS[1] + 1))
    prompt = [1 + (number * 7 + place) % (VOCAB_SIZE - 1) for place in range(num_prompt)]
    return Arrival(now_s, f"tenant-{random.integers(NUM_DOMAINS)}", prompt, num_output, num_output)
