"""When each token of each job came, and the figures that follow from it. Times in seconds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Timeline:
    """One job. It arrives when its client would send it, whether or not anybody takes it then."""

    arrived_s: float
    token_times_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.arrived_s

    @property
    def latency_s(self) -> float:
        return self.token_times_s[-1] - self.arrived_s

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies."""
        return [after - before for before, after in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


def percentile(values: Sequence[float], percent: int) -> float:
    """Nearest rank: the smallest value that at least ``percent`` of all do not exceed. 0.0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0.0


def summary(timelines: Sequence[Timeline], wall_s: float) -> dict[str, float]:
    """Rates over the whole run; medians and 95th percentiles over jobs, or over all gaps between tokens."""
    ttft = [timeline.ttft_s for timeline in timelines]
    latency = [timeline.latency_s for timeline in timelines]
    gaps = [gap for timeline in timelines for gap in timeline.gaps_s]
    num_tokens = sum(len(timeline.token_times_s) for timeline in timelines)
    figures = {
        "output_tokens_per_s": num_tokens / wall_s,
        "requests_per_s": len(timelines) / wall_s,
        "ttft_p50_s": statistics.median(ttft),
        "ttft_p95_s": percentile(ttft, 95),
        "itl_p50_s": statistics.median(gaps) if gaps else 0.0,
        "itl_p95_s": percentile(gaps, 95),
        "latency_p50_s": statistics.median(latency),
        "latency_p95_s": percentile(latency, 95),
    }
    return {name: float(f"{value:.4g}") for name, value in figures.items()}
