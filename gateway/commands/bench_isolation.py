"""bulkhead bench isolation: what the run-time auditor costs, as a share of the engine's time, and what it finds."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from gateway.commands.bench_engine import CONCURRENCIES, REQUESTS_MIN, table
from gateway.commands.bench_process import measure

SHOWN = (
    "level",
    "concurrency",
    "num_steps",
    "step_mean_ms",
    "audit_mean_ms",
    "audit_share",
    "output_tokens_per_s",
    "answers_run_again",
)


class Level(StrEnum):
    books = "books"
    default = "default"
    full = "full"


def bench_isolation(
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, max=256, help="jobs at a time; repeatable; 1, 8 and 32")
    ] = None,
    level: Annotated[
        list[Level] | None,
        typer.Option(
            help="books: no sampled check; default: as the settings' defaults; full: all; repeatable; all three"
        ),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, max=100, help="jobs of a row: this many times its concurrency")] = 2,
    threads: Annotated[int, typer.Option(min=1, max=256, help="threads that compute")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows and their sums here")] = None,
) -> None:
    """Run the engine on the demo workload with the auditor checking every step, time the auditor alone, and run answers
    again alone afterwards."""
    plan = [(clients, name) for clients in concurrency or CONCURRENCIES for name in level or Level]
    rows: list[dict[str, Any]] = []
    for clients, name in track(plan, description="rows", console=Console(stderr=True)):
        row = measure(
            *("--threads", str(threads), "engine", "--mode", "continuous", "--workload", "uniform", "--logprobs", "0"),
            *("--concurrency", str(clients), "--requests", str(max(REQUESTS_MIN, batches * clients))),
            module=("gateway.audited_bench", name.value),
        )
        told = {"audit_mean_ms": row["observer_mean_ms"], "audit_share": row["observer_share"]}
        rows.append(row | told | {"level": name.value, "answers_run_again": row["observer"]["num_replays"]})
        if json_file is not None:
            json_file.write_text(json.dumps(summary(rows) | {"rows": rows}, indent=1))
    Console().print(table(rows, SHOWN))
    Console().print_json(json.dumps(summary(rows)))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``audit_cost_share`` by level and concurrency; of all rows: steps that were audited, violations (the engine is
    clean: each is a false alarm), answers that were run again alone, and the bits in which they differed."""
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        shares.setdefault(row["level"], {})[str(row["concurrency"])] = row["audit_share"]
    sums = {
        name: sum(row["observer"][counter] for row in rows)
        for name, counter in (
            ("steps_audited", "num_steps"),
            ("false_alarms", "num_violations"),
            ("traces_compared", "num_replays"),
            ("differing_bits", "num_replay_bits_differing"),
        )
    }
    return {"audit_cost_share": shares} | sums
