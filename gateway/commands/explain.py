"""`bulkhead worker --explain`: who would compute what, asked of a process of its own: this one never imports torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from gateway.commands.session import CommandError
from gateway.host.engine_host import worker_config, worker_environment
from gateway.host.folders import Folders
from gateway.settings import load_settings
from gateway.world import real_world

TIMEOUT_S = 600  # a large model takes its time to load
OF_THE_AUDITOR = "audit_"
FACTS = {
    "kernels": "kernels",
    "device": "device",
    "instruction_set": "instruction set",
    "num_threads": "threads",
    "dtype": "numbers",
    "kv_cache_dtype": "keys and values",
    "cuda_graphs": "CUDA graphs",
    "model_code": "model code",
    "isolation": "isolation",
    "reason": "because",
}


def explain(config: str | None, json_file: Path | None) -> None:
    """``config`` None: as `bulkhead serve` would start a worker. Raises CommandError with the worker's own reason where
    it would not start."""
    world = real_world()
    fields: dict[str, Any]
    if config is None:
        settings = load_settings(world.environ)
        fields = dict(worker_config(settings, Folders(settings.data_dir, settings.data_dir)))
    else:
        fields = json.loads(config)
    of_the_engine = {name: value for name, value in fields.items() if not name.startswith(OF_THE_AUDITOR)}
    command = [sys.executable, "-m", "engine.explain", "--config", msgspec.json.encode(of_the_engine).decode()]
    done = subprocess.run(  # noqa: S603
        command,
        env=worker_environment(world.environ),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise CommandError((done.stderr.splitlines() or ["the worker's process said nothing"])[-1])
    answer = json.loads(done.stdout.splitlines()[-1])
    if json_file is not None:
        json_file.write_text(json.dumps(answer, indent=1) + "\n")
    console = Console()
    for table in tables(answer):
        console.print(table)
    for note in answer["notes"]:
        console.print(note)


def wording(fact: Any) -> str:
    return (", ".join(str(one) for one in fact) or "none") if isinstance(fact, list) else str(fact)


def tables(answer: dict[str, Any]) -> tuple[Table, Table]:
    facts = Table(box=None, show_header=False)
    for name, label in FACTS.items():
        facts.add_row(label, wording(answer[name]))
    ops = Table("op", "computed by", "launch", box=None)
    for op in answer["ops"]:
        launches = [", ".join(f"{name} {value}" for name, value in launch.items()) for launch in op["launches"]]
        ops.add_row(op["op"], op["source"], "\n".join(launches))
    return facts, ops
