"""bulkhead bench soak: random load with aborts on a worker process of its own, and what is left of it afterwards."""

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from engine.bench.soak import soak
from gateway.commands.bench_process import model_dir
from gateway.commands.session import CommandError
from gateway.host.deathsig import dying_with_me
from gateway.host.engine_host import worker_command, worker_config, worker_environment
from gateway.host.folders import Folders
from gateway.settings import load_settings
from gateway.world import real_world

SEED = 1
OVERHEAD_BYTES_MAX = 700_000_000  # of the worker beside weights and KV cache


def bench_soak(
    seconds: Annotated[float, typer.Option(min=3, max=86_400, help="how long clients send requests")] = 600.0,
    concurrency: Annotated[int, typer.Option(min=1, max=200, help="requests in flight")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Load a worker process with random requests and aborts, and check that nothing is left: blocks, memory, errors."""
    settings = load_settings(real_world().environ)
    model = model_dir()
    with tempfile.TemporaryDirectory() as name:
        folders = Folders(Path(name), Path(name))
        config = worker_config(settings, folders)
        answer = asyncio.run(
            soak(
                dying_with_me(worker_command(config)),
                worker_environment(real_world().environ),
                folders.engine_socket,
                seconds=seconds,
                concurrency=concurrency,
                seed=SEED,
                now=time.monotonic,
                progress=Console(stderr=True).print,
            )
        )
    weights_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    answer["weights_bytes"] = weights_bytes
    answer["kv_cache_bytes"] = settings.kv_cache_bytes
    kept_bytes = weights_bytes + settings.kv_cache_bytes
    answer["overhead_bytes"] = answer["rss_end_bytes"] - kept_bytes
    answer["overhead_peak_bytes"] = answer["rss_peak_bytes"] - kept_bytes
    if answer["overhead_bytes"] > OVERHEAD_BYTES_MAX:
        answer["failures"].append(f"{answer['overhead_bytes']} bytes beside weights and KV cache are too much")
    if json_file is not None:
        json_file.write_text(json.dumps(answer, indent=1))
    table = Table("figure", "value", box=None)
    for figure, value in answer.items():
        table.add_row(figure, str(value))
    Console().print(table)
    if answer["failures"]:
        raise CommandError("; ".join(answer["failures"]))
