"""Start a worker as its own process, as the gateway does."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@contextmanager
def worker(folder: Path, model_dir: Path, **changes: Any) -> Iterator["subprocess.Popen[str]"]:
    """A running worker on ``folder``/engine.sock with its journal in ``folder``/journal; killed at the end."""
    settings = {
        "model_dir": str(model_dir),
        "socket_path": str(folder / "engine.sock"),
        "journal_dir": str(folder / "journal"),
        "num_blocks": 400,
        "num_threads": 1,
        "dtype": "float32",
    } | changes
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.worker_process", json.dumps(settings)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def wait_ended(process: "subprocess.Popen[str]", timeout_s: float = 30.0) -> int:
    """The exit code, without blocking the event loop."""
    async with asyncio.timeout(timeout_s):
        while process.poll() is None:
            await asyncio.sleep(0.02)
    assert process.returncode is not None
    return process.returncode


def main() -> int:
    from engine.config import WorkerConfig
    from engine.worker import run_worker

    settings = json.loads(sys.argv[1])
    paths = {name: Path(settings.pop(name)) for name in ("model_dir", "socket_path", "journal_dir")}
    return run_worker(WorkerConfig(**paths, **settings), None)


if __name__ == "__main__":
    raise SystemExit(main())
