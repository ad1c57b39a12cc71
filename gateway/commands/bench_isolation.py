"""bulkhead bench isolation: what the run-time auditor costs, as a share of the engine's time."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from gateway.commands.bench_engine import CONCURRENCIES, REQUESTS_MIN, table
from gateway.commands.bench_process import measure

SHOWN = (
    "concurrency",
    "num_steps",
    "step_mean_ms",
    "audit_mean_ms",
    "audit_share",
    "output_tokens_per_s",
    "slot_utilisation",
)


def bench_isolation(
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, max=256, help="jobs at a time; repeatable; 1, 8 and 32")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, max=100, help="jobs of a row: this many times its concurrency")] = 2,
    threads: Annotated[int, typer.Option(min=1, max=256, help="threads that compute")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
) -> None:
    """Run the engine on the demo workload with the auditor checking every step, and time the auditor alone."""
    rows = []
    for clients in track(concurrency or CONCURRENCIES, description="rows", console=Console(stderr=True)):
        row = measure(
            *("--threads", str(threads), "engine", "--mode", "continuous", "--workload", "uniform"),
            *("--concurrency", str(clients), "--requests", str(max(REQUESTS_MIN, batches * clients))),
            module="gateway.audited_bench",
        )
        rows.append(row | {"audit_mean_ms": row["observer_mean_ms"], "audit_share": row["observer_share"]})
        if json_file is not None:
            json_file.write_text(json.dumps({"rows": rows}, indent=1))
    Console().print(table(rows, SHOWN))
