"""bulkhead bench engine: the engine alone, static and continuous batching side by side, and transformers' own."""

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gateway.commands.bench_process import measure

REQUESTS_MIN = 8
CONCURRENCIES = (1, 8, 32)
SHOWN = (
    "workload",
    "concurrency",
    "mode",
    "output_tokens_per_s",
    "requests_per_s",
    "ttft_p50_s",
    "itl_p50_s",
    "latency_p50_s",
    "latency_p95_s",
    "slot_utilisation",
    "peak_rss_bytes",
)


class Mode(StrEnum):
    continuous = "continuous"
    static = "static"
    hf_static = "hf_static"


class Workload(StrEnum):
    uniform = "uniform"
    log_normal = "log_normal"


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


def bench_engine(
    mode: Annotated[list[Mode] | None, typer.Option(help="kind of batching; repeatable; all where not given")] = None,
    workload: Annotated[list[Workload] | None, typer.Option(help="output lengths; repeatable; both")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, max=256, help="jobs at a time; repeatable; 1, 8 and 32")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, max=100, help="jobs of a row: this many times its concurrency")] = 3,
    threads: Annotated[int, typer.Option(min=1, max=256, help="threads that compute")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="numbers of the weights")] = Dtype.bfloat16,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
) -> None:
    """Run the engine without server or auditor on random prompts and report rates and latencies."""
    plan = [(w, c, m) for w in workload or Workload for c in concurrency or CONCURRENCIES for m in mode or Mode]
    rows = []
    for name, clients, how in track(plan, description="rows", console=Console(stderr=True)):
        num_requests = max(REQUESTS_MIN, batches * clients)
        rows.append(
            measure(
                *("--threads", str(threads), "engine", "--mode", how, "--workload", name, "--dtype", dtype),
                *("--concurrency", str(clients), "--requests", str(num_requests)),
            )
        )
        if json_file is not None:
            json_file.write_text(json.dumps({"rows": rows}, indent=1))  # after each row: an interrupted run keeps them
    Console().print(table(rows, SHOWN))


def table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    result = Table(*names, box=None)
    for row in rows:
        result.add_row(*(str(row[name]) for name in names))
    return result
