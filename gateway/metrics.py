"""Metrics for Prometheus: what happened to requests, and how the engine and the audit are doing.

Names that begin with ``vllm:`` mean exactly what vLLM's dashboards expect of them; ours begin with ``bulkhead_``. A
tenant label comes from the ledger's own tenants only and from at most TENANTS_MAX of them; the rest are "other", so
that nobody can grow a scraper's memory. Each name is described in docs/metrics.md.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.protocol import Ready, Stats
from gateway.engine_link import EngineLink
from gateway.rights.standing import StandingWatch

TENANTS_MAX = 1_000
TTFT_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
GAP_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1_024, 4_096, 16_384)
LATENCY_BUCKETS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class LoopHealth(Protocol):
    """What background work tells about itself (gateway/host/background.py)."""

    name: str
    num_failures: int


class Metrics:
    """One registry of its own, never the process-wide one: two gateways in one test do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._tenants: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, registry=self.registry, buckets=buckets)

        self._responses = counter("bulkhead_http_responses", "HTTP answers", "status")
        self._requests = counter("bulkhead_requests", "Admitted requests by how they ended", "tenant", "finish_reason")
        self._tokens = counter("bulkhead_tokens", "Tokens charged", "tenant", "kind")
        self._would_refuse = counter("bulkhead_would_refuse", "Served, against a limit in shadow", "tenant", "limit")
        self._lost = counter("bulkhead_quota_outages", "Times that the store of quotas was lost")
        self._by_policy = counter("bulkhead_quota_by_policy", "Requests without the store", "tenant", "mode", "outcome")
        self._rebuilt = counter("bulkhead_quota_rebuilds", "Counters made anew from the ledger", "reason")
        self._webhooks = counter("bulkhead_webhook_attempts", "Webhook deliveries tried, by outcome", "outcome")
        self._success = counter("vllm:request_success", "Requests that ended with an answer", "finished_reason")
        self._ttft = histogram("vllm:time_to_first_token_seconds", "Admission to first text", TTFT_BUCKETS_S)
        self._gaps = histogram("vllm:inter_token_latency_seconds", "Between one token and the next", GAP_BUCKETS_S)
        self._prompts = histogram("vllm:request_prompt_tokens", "Prompt tokens of each request", TOKEN_BUCKETS)
        self._answers = histogram("vllm:request_generation_tokens", "Tokens of each answer", TOKEN_BUCKETS)
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens that the prefix cache was asked for")
        self._hits = counter("vllm:prefix_cache_hits", "Of those, tokens that it had")
        self._latency = histogram("vllm:e2e_request_latency_seconds", "Admission to the end", LATENCY_BUCKETS_S)

    def watch_engine(self, link: EngineLink) -> None:
        self.registry.register(_EngineCollector(link))

    def watch_loops(self, loops: Sequence[LoopHealth]) -> None:
        self.registry.register(_LoopCollector(loops))

    def watch_store(self, is_there: Callable[[], bool]) -> None:
        self.registry.register(_StoreCollector(is_there))

    def watch_standing(self, standing: StandingWatch) -> None:
        self.registry.register(_StandingCollector(standing))

    def store_lost(self) -> None:
        self._lost.inc()

    def admitted_without_store(self, tenant: str, mode: str, *, granted: bool) -> None:
        """The store of quotas was gone, and the tenant's policy decided."""
        self._by_policy.labels(self._tenant(tenant), mode, "admitted" if granted else "refused").inc()

    def quota_rebuilt(self, reason: str) -> None:
        self._rebuilt.labels(reason).inc()

    def answered(self, status: int) -> None:
        self._responses.labels(str(status)).inc()

    def first_text(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_text(self, seconds: float, num_tokens: int) -> None:
        """So long after the same choice's text before it; its tokens share the time."""
        for _ in range(num_tokens):
            self._gaps.observe(seconds / num_tokens)

    def ended(
        self,
        tenant: str,
        finish_reason: str,
        seconds: float,
        *,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_completion_tokens: int,
    ) -> None:
        """One admitted request is over; the counts are what it is charged for."""
        label = self._tenant(tenant)
        self._requests.labels(label, finish_reason).inc()
        self._tokens.labels(label, "prompt").inc(num_prompt_tokens - num_cached_tokens)
        self._tokens.labels(label, "cached").inc(num_cached_tokens)
        self._tokens.labels(label, "completion").inc(num_completion_tokens)
        self._prompts.observe(num_prompt_tokens)
        self._answers.observe(num_completion_tokens)
        self._queries.inc(num_prompt_tokens)
        self._hits.inc(num_cached_tokens)
        self._latency.observe(seconds)
        if finish_reason in ("stop", "length"):
            self._success.labels(finish_reason).inc()

    def would_refuse(self, tenant: str, limit: str) -> None:
        """A limit in shadow would have refused a request."""
        self._would_refuse.labels(self._tenant(tenant), limit).inc()

    def webhook_attempt(self, outcome: str) -> None:
        """``delivered``, ``failed`` (it will be tried again) or ``dead``."""
        self._webhooks.labels(outcome).inc()

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)

    def _tenant(self, tenant: str) -> str:
        if tenant not in self._tenants:
            if len(self._tenants) >= TENANTS_MAX:
                return "other"
            self._tenants.add(tenant)
        return tenant


class _EngineCollector(Collector):
    """Reads the link when scraped. While no worker is connected, its figures are absent rather than old."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link

    def collect(self) -> Iterable[Metric]:
        status = self._link.status
        yield GaugeMetricFamily("bulkhead_engine_ready", "1 while a worker is connected", int(status.state == "ready"))
        yield CounterMetricFamily("bulkhead_engine_restarts", "Worker restarts", status.num_restarts)
        if status.ready is not None and status.stats is not None:
            yield from _engine_metrics(status.ready, status.stats)


def _engine_metrics(ready: Ready, stats: Stats) -> Iterable[Metric]:
    def gauge(name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([ready.model_id], value)
        return family

    def counter(name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([ready.model_id], value)
        return family

    used = stats.num_blocks - stats.num_blocks_free
    yield gauge("vllm:num_requests_running", "Sequences in the batch", stats.num_running)
    yield gauge("vllm:num_requests_waiting", "Sequences waiting", stats.num_waiting)
    yield gauge("vllm:kv_cache_usage_perc", "KV blocks in use, 0 to 1", used / max(1, stats.num_blocks))
    yield counter("vllm:num_preemptions", "Preemptions", stats.num_preemptions)
    yield counter("vllm:prompt_tokens", "Prompt tokens computed", stats.num_prompt_tokens)
    yield counter("vllm:generation_tokens", "Tokens generated", stats.num_completion_tokens)
    yield counter("bulkhead_engine_steps", "Engine steps", stats.step)
    yield counter("bulkhead_engine_batch_tokens", "Tokens computed in all steps", stats.num_batch_tokens)
    yield counter("bulkhead_engine_batch_rows", "Rows of all steps", stats.num_batch_rows)
    yield gauge("bulkhead_engine_rows_max", "Rows that a step can have", stats.num_rows_max)
    yield gauge("bulkhead_engine_slots_held", "Cache slots of blocks in use", stats.num_slots_held)
    yield gauge("bulkhead_engine_slots_filled", "Of those, slots with a token", stats.num_slots_filled)
    yield counter("bulkhead_engine_blocks_scrubbed", "Blocks zeroed between tenants", stats.num_blocks_scrubbed)
    yield counter("bulkhead_engine_preemptions_kept", "Preemptions that kept blocks", stats.num_preemptions_kept)
    yield gauge("bulkhead_engine_closed", "1 where too many violations ended admission", int(stats.closed))
    yield counter("bulkhead_engine_steps_broken_off", "Steps broken off and computed again", stats.num_steps_broken_off)
    yield counter("bulkhead_engine_tokens_lost", "Tokens of steps that were broken off", stats.num_tokens_lost)
    yield counter("bulkhead_engine_rescues", "Sequences that had waited too long", stats.num_rescued)
    yield counter("bulkhead_engine_step_seconds", "Time of all steps", stats.step_ns / 1e9)
    yield counter("bulkhead_engine_own_seconds", "Of that, what was no tenant's", stats.own_ns / 1e9)
    info = GaugeMetricFamily("bulkhead_isolation_info", "Isolation mode and kernels", labels=["isolation", "kernels"])
    info.add_metric([ready.isolation, ready.kernels], 1)
    yield info
    for name, value in sorted(stats.audit.items()):
        if name.startswith("num_"):
            yield counter(f"bulkhead_audit_{name.removeprefix('num_')}", "Isolation auditor", value)
        elif name.startswith("replay"):
            yield gauge(f"bulkhead_audit_{name}", "Isolation auditor: answers to be run again", value)


class _StoreCollector(Collector):
    def __init__(self, is_there: Callable[[], bool]) -> None:
        self._is_there = is_there

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("bulkhead_quota_store", "1 while the store of quotas answers", int(self._is_there()))


class _StandingCollector(Collector):
    def __init__(self, standing: StandingWatch) -> None:
        self._standing = standing

    def collect(self) -> Iterable[Metric]:
        if (seen := self._standing.seen) is not None:
            text = "By what append-only is held, and whether tenants are walled off"
            family = GaugeMetricFamily("bulkhead_database_info", text, labels=["append_only", "row_security"])
            family.add_metric([seen.append_only, "on" if seen.row_security else "off"], 1)
            yield family


class _LoopCollector(Collector):
    def __init__(self, loops: Sequence[LoopHealth]) -> None:
        self._loops = loops

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily("bulkhead_loop_failures", "Failed rounds of background work", labels=["loop"])
        for loop in self._loops:
            family.add_metric([loop.name], loop.num_failures)
        yield family
