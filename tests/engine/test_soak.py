"""A soak ends clean, and one that leaves something says what."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine.bench.soak import GROWTH_BYTES_MAX, JUDGED_SECONDS, failures, soak


def run(folder: Path, model_dir: Path, *, seconds: float, concurrency: int) -> dict[str, Any]:
    settings = {
        "model_dir": str(model_dir),
        "socket_path": str(folder / "engine.sock"),
        "journal_dir": str(folder / "journal"),
        "num_blocks": 120,
        "num_threads": 1,
        "dtype": "float32",
    }
    command = [sys.executable, "-m", "tests.engine.worker_process", json.dumps(settings)]
    socket_path = folder / "engine.sock"
    return asyncio.run(
        soak(command, os.environ, socket_path, seconds=seconds, concurrency=concurrency, seed=1, now=time.monotonic)
    )


def test_a_short_soak_ends_clean(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Blocks for a third of the rows: preemption for blocks is part of it. Memory is judged in the deep one."""
    answer = run(tmp_path, tiny_model_dir, seconds=2.0, concurrency=64)
    assert answer["failures"] == []
    assert answer["num_requests"] >= 64
    assert answer["ended"]["abort"] > 0, "at least what was in flight at the end"
    assert set(answer["ended"]) <= {"abort", "length"}


@pytest.mark.deep
def test_a_long_soak_ends_clean(tmp_path: Path, tiny_model_dir: Path) -> None:
    answer = run(tmp_path, tiny_model_dir, seconds=600.0, concurrency=64)
    assert answer["failures"] == []


def test_what_is_left_is_said() -> None:
    clean: dict[str, Any] = {
        "ended": {"length": 3, "abort": 1},
        "seconds": JUDGED_SECONDS,
        "num_blocks": 9,
        "num_blocks_free": 9,
        "rss_growth_bytes": GROWTH_BYTES_MAX,
        "num_incidents": 0,
        "exit_code": 0,
    }
    assert failures(clean) == []
    assert failures(clean | {"seconds": JUDGED_SECONDS - 1, "rss_growth_bytes": 10 * GROWTH_BYTES_MAX}) == []
    for change, word in (
        ({"ended": {"length": 3, "error: engine_failure": 1}}, "engine_failure"),
        ({"num_blocks_free": 8}, "1 blocks"),
        ({"rss_growth_bytes": GROWTH_BYTES_MAX + 1}, "memory"),
        ({"num_incidents": 2}, "2 incidents"),
        ({"exit_code": -9}, "-9"),
    ):
        (line,) = failures(clean | change)
        assert word in line
