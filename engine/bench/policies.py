"""Policies of the scheduler on the same traces: who waits how long. In virtual time, see virtual_time.py."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from engine.bench import traces
from engine.bench.timeline import percentile
from engine.bench.virtual_time import StepCost, VirtualEngine


def rows(
    policies: Sequence[str],
    trace_names: Sequence[str],
    *,
    num_requests: int,
    load: float,
    cost: StepCost,
    seed: int,
    max_prompt_tokens: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    found = []
    for trace in trace_names:
        arrivals = traces.draw(trace, num_requests, load=load, cost=cost, seed=seed)
        for policy in policies:
            progress(f"policies: {trace}, {policy}")
            engine = VirtualEngine(cost, policy, max_prompt_tokens=max_prompt_tokens)
            served = engine.replay(arrivals)
            latency = [one.timeline.latency_s for one in served]
            figures = {
                "latency_mean_s": statistics.mean(latency),
                "latency_p99_s": percentile(latency, 99),
                "ttft_p50_s": statistics.median(one.timeline.ttft_s for one in served),
                "ttft_p99_s": percentile([one.timeline.ttft_s for one in served], 99),
                "wait_max_s": max(one.wait_s for one in served),
            }
            row: dict[str, Any] = {"policy": policy, "trace": trace, "num_requests": num_requests, "load": load}
            found.append(row | {name: float(f"{value:.4g}") for name, value in figures.items()})
    return found
