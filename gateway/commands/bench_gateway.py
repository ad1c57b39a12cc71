"""bulkhead bench gateway overshoot | overhead: gateways on servers of their own, an engine that follows a script."""

import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from gateway.logs import configure_logs
from gateway.world import real_world

DETAILS = {
    "stages_ms": "inside the gateway, ms of a request: p50 / p99",
    "cores_ms": "on the cores, ms for each request: used / waited for",
}
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the figures here")]


def bench_overshoot(
    tenants: Annotated[int, typer.Option(min=1, max=64)] = 8,
    streams: Annotated[int, typer.Option(min=1, max=512, help="clients of each tenant, at the same time")] = 128,
    budget: Annotated[int, typer.Option(min=100, help="tokens of each tenant's hard budget")] = 20_000,
    max_tokens: Annotated[int, typer.Option(min=8, help="of each request")] = 200,
    seconds: Annotated[int, typer.Option(min=5, max=600, help="clients give up after this long")] = 240,
    kill_after: Annotated[float, typer.Option(min=0.0, help="seconds until a gateway is killed")] = 4.0,
    empty_after: Annotated[float, typer.Option(min=0.0, help="seconds until Valkey is killed and starts empty")] = 7.0,
    json_file: JsonFile = None,
) -> None:
    """Hard budgets under three gateways, one of them killed with kill -9 and Valkey emptied meanwhile."""
    from gateway.bench.overshoot import Plan, measure_overshoot

    plan = Plan(
        num_tenants=tenants,
        num_streams=streams,
        budget_tokens=budget,
        max_tokens=max_tokens,
        time_limit_s=seconds,
        kill_after_s=kill_after,
        empty_after_s=empty_after,
    )
    found = _run(measure_overshoot(real_world(), plan))
    _write({"overshoot": found}, json_file)
    table = Table("figure", "value", box=None)
    for name, value in found.items():
        table.add_row(name, str(value))
    Console().print(table)


def bench_overhead(
    rate: Annotated[list[int] | None, typer.Option(help="requests per second; repeatable")] = None,
    seconds: Annotated[float, typer.Option(min=1, max=60, help="of each measurement")] = 8.0,
    ledger_rows: Annotated[
        list[int] | None,
        typer.Option(min=0, max=20_000_000, help="written into the ledger first; repeatable: measured with each"),
    ] = None,
    stages: Annotated[bool, typer.Option("--stages", help="also where the time went")] = False,
    sqlite: Annotated[bool, typer.Option("--sqlite", help="SQLite instead of PostgreSQL")] = False,
    json_file: JsonFile = None,
) -> None:
    """What authentication, quota, hold, capture, outbox and HTTPS add to the engine's own latency; open loop."""
    from gateway.bench.overhead import Plan, measure_overhead

    histories = tuple(ledger_rows or (0,))
    rates = tuple(rate or (50, 200))
    plan = Plan(rates=rates, seconds=seconds, ledger_rows=histories, postgres=not sqlite, stages=stages)
    say = Console(stderr=True).print
    found = _run(measure_overhead(real_world(), plan, say))
    _write(found, json_file)
    rows = found["overhead"]
    columns = [name for name in rows[0] if name not in DETAILS]
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns))
    console = Console()
    console.print(table)
    for detail, title in DETAILS.items():
        if detail in rows[0]:
            console.print(_detail_table(rows, detail, title))


def _detail_table(rows: list[dict[str, Any]], detail: str, title: str) -> Table:
    table = Table("rate_rps", "ledger_rows", *rows[0][detail], title=title, box=None)
    for row in rows:
        pairs = (f"{first:g} / {second:g}" for first, second in row[detail].values())
        table.add_row(str(row["rate_rps"]), str(row["ledger_rows"]), *pairs)
    return table


def _run(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    configure_logs("error")
    return uvloop.run(work)  # the load shares the cores with what it measures: the cheapest loop there is


def _write(found: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
