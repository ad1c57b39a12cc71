"""One server for all tests that do not break it; those that do start their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Server]:
    own_runs = {"audit_replay_percent": "100", "audit_idle_percent": "100", "audit_canary_interval_s": "1"}
    with Server(tmp_path_factory.mktemp("server") / "data", model_dir, **own_runs) as running:
        yield running
        assert running.stop() == 0
