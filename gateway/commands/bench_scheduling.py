"""bulkhead bench policies | fairness: the scheduler's policies in virtual time, at the measured cost of a step."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gateway.commands.bench_engine import table
from gateway.commands.bench_process import measure

SCHEDULER_SHOWN = (
    *("policy", "num_running_mean", "num_waiting", "schedule_p50_ms", "schedule_p95_ms", "step_p50_ms", "step_p95_ms"),
)
DOMAINS = (2, 4, 8, 16, 32)
Threads = Annotated[int, typer.Option(min=1, max=256, help="threads that compute while the cost of a step is measured")]
PromptTokens = Annotated[
    int, typer.Option(min=0, max=65_536, help="of prompts in a step that also generates; 0: what the budget leaves")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the rows here")]


def bench_policies(
    requests: Annotated[int, typer.Option(min=10, max=100_000, help="requests of each trace")] = 1_000,
    load: Annotated[float, typer.Option(min=0.05, max=5.0, help="offered work, as a share of full batches")] = 0.9,
    threads: Threads = 1,
    max_prompt_tokens: PromptTokens = 0,
    json_file: JsonFile = None,
) -> None:
    """Replay chat-like, code-like and mixed traces under every scheduling policy: who waits how long."""
    bound = ("--max-prompt-tokens", str(max_prompt_tokens))
    answer = measure("--threads", str(threads), "policies", "--requests", str(requests), "--load", str(load), *bound)
    shown = ("trace", "policy", "latency_mean_s", "latency_p99_s", "ttft_p50_s", "ttft_p99_s", "wait_max_s")
    _show(answer, shown, json_file)
    Console().print(table(answer["scheduler"], SCHEDULER_SHOWN))


def bench_fairness(
    domains: Annotated[
        list[int] | None, typer.Option(min=2, max=256, help="tenants with work waiting; repeatable; 2 to 32")
    ] = None,
    steps: Annotated[int, typer.Option(min=100, max=1_000_000, help="engine steps of each row")] = 4_500,
    threads: Threads = 1,
    max_prompt_tokens: PromptTokens = 0,
    break_off_percent: Annotated[
        int, typer.Option(min=0, max=50, help="of tokens that breaking off steps may cost, in a second row of `fair`")
    ] = 3,
    json_file: JsonFile = None,
) -> None:
    """Flood the engine from one tenant, and report what the others and a quiet one get under every policy."""
    bound = ("--max-prompt-tokens", str(max_prompt_tokens), "--break-off-percent", str(break_off_percent))
    counts = [str(count) for count in domains or DOMAINS]
    answer = measure("--threads", str(threads), "fairness", "--domains", *counts, "--steps", str(steps), *bound)
    shown = (
        *("domains", "policy", "break_off_percent", "gap_tokens_max", "bound_tokens", "jain", "quiet_ttft_p99_ratio"),
        *("quiet_rest_ratio", "quiet_queue_ratio", "quiet_read_ratio", "throughput_ratio"),
        *("equal_lengths_throughput_ratio", "tokens_lost_ratio"),
    )
    _show(answer, shown, json_file)


def _show(answer: dict[str, Any], names: tuple[str, ...], json_file: Path | None) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(answer, indent=1))
    Console().print(table(answer["rows"], names))
