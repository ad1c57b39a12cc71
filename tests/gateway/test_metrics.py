"""Metrics: closed to strangers, bounded in labels, exact in tokens."""

import asyncio
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import Ready, Stats
from gateway.engine_link import EngineStatus
from gateway.metrics import TENANTS_MAX, Metrics
from gateway.secrets import metrics_token
from tests.gateway.conftest import Stage

DOCUMENTED = Path(__file__).parents[2] / "docs" / "metrics.md"
READY = Ready(1, "epoch", 1, "model", "digest", 8192, 100, 32, 10, "bfloat16", "cpu", "torch-cpu", "relaxed")
STATS = Stats(7, 2, 1, 10, 4, {"ten_1": 6}, 100, 50, 3, {"num_steps": 7, "num_violations": 0, "last_step": 7})


class FixedLink:
    status = EngineStatus("ready", 2, READY, STATS)


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in\n{text}"
    return float(found.group(1))


def test_the_engine_is_read_when_scraped() -> None:
    metrics = Metrics()
    metrics.watch_engine(FixedLink())  # type: ignore[arg-type]
    text = metrics.render().decode()
    assert value(text, 'vllm:kv_cache_usage_perc{model_name="model"}') == 0.6
    assert value(text, 'vllm:num_requests_running{model_name="model"}') == 2
    assert value(text, 'bulkhead_audit_steps_total{model_name="model"}') == 7
    assert value(text, "bulkhead_engine_restarts_total") == 2


def test_every_name_is_documented() -> None:
    metrics = Metrics()
    metrics.watch_engine(FixedLink())  # type: ignore[arg-type]
    metrics.watch_loops([])
    names = {family.name for family in metrics.registry.collect()}
    documented = set(re.findall(r"^\| `([^`]+)` \| (?:gauge|counter|histogram)", DOCUMENTED.read_text(), re.MULTILINE))
    assert names <= documented


VLLM = {  # what vLLM's dashboards draw, as far as it means the same here
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions", "prompt_tokens"),
    *("generation_tokens", "request_success", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("e2e_request_latency_seconds", "request_prompt_tokens", "request_generation_tokens"),
    *("prefix_cache_queries", "prefix_cache_hits"),
}
OURS = {"steps", "batch_tokens", "batch_rows", "rows_max", "preemptions_kept", "blocks_scrubbed"}


def test_the_names_that_dashboards_know_are_there() -> None:
    metrics = Metrics()
    metrics.watch_engine(FixedLink())  # type: ignore[arg-type]
    metrics.first_text(0.03)
    metrics.next_text(0.045, 3)
    for cached in (0, 32):
        metrics.ended("ten", "stop", 1.0, num_prompt_tokens=50, num_cached_tokens=cached, num_completion_tokens=7)
    names = {family.name for family in metrics.registry.collect()}
    assert {name.removeprefix("vllm:") for name in names if name.startswith("vllm:")} == VLLM
    assert {f"bulkhead_engine_{name}" for name in OURS} <= names
    text = metrics.render().decode()
    assert value(text, "vllm:prefix_cache_queries_total") == 100
    assert value(text, "vllm:prefix_cache_hits_total") == 32
    assert value(text, "vllm:request_generation_tokens_sum") == 14
    assert value(text, "vllm:request_prompt_tokens_count") == 2
    assert value(text, 'vllm:inter_token_latency_seconds_bucket{le="0.02"}') == 3
    assert round(value(text, "vllm:inter_token_latency_seconds_sum"), 6) == 0.045


@given(st.lists(st.text(min_size=1, max_size=20), max_size=30))
def test_any_tenant_name_is_one_well_formed_label(names: list[str]) -> None:
    metrics = Metrics()
    for name in names:
        metrics.ended(name, "stop", 1.0, num_prompt_tokens=3, num_cached_tokens=1, num_completion_tokens=2)
    lines = metrics.render().decode().split("\n")
    counted = [line for line in lines if line.startswith("bulkhead_requests_total{")]
    assert len(counted) == len(set(names))
    assert sum(float(line.rpartition(" ")[2]) for line in counted) == len(names)


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for number in range(TENANTS_MAX + 50):
        metrics.ended(f"t{number}", "stop", 1.0, num_prompt_tokens=1, num_cached_tokens=0, num_completion_tokens=1)
    text = metrics.render().decode()
    assert text.count("bulkhead_requests_total{") == TENANTS_MAX + 1
    assert value(text, 'bulkhead_requests_total{finish_reason="stop",tenant="other"}') == 50


def test_a_scraper_needs_the_token_and_sees_what_was_charged(runner: asyncio.Runner, stage: Stage) -> None:
    hall, _ = stage.make()

    async def scenario() -> None:
        key = hall.accounts["acme"].secret
        for credentials in ("", f"Bearer {key}", "Bearer " + "0" * 64):
            answer = await hall.call("GET", "/metrics", tenant=None, headers={"authorization": credentials})
            assert answer.status == 401
        await hall.chat(max_tokens=5)
        await hall.settler.drain(5)
        token = {"authorization": f"Bearer {metrics_token(hall.services.secrets)}"}
        text = (await hall.call("GET", "/metrics", tenant=None, headers=token)).body.decode()
        rows = await hall.usage_rows()
        charged = sum(row.num_completion_tokens for row in rows.values())
        assert value(text, 'bulkhead_tokens_total{kind="completion",tenant="acme"}') == charged > 0
        assert value(text, 'bulkhead_http_responses_total{status="401"}') == 3
        assert value(text, "vllm:time_to_first_token_seconds_count") == 1
        assert 0 < value(text, "vllm:inter_token_latency_seconds_count") < charged, "not those of the first text"

    runner.run(scenario())
