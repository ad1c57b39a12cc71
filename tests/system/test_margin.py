"""What requests took of a real engine: in proportion to what tenants ask for, and still there after a crash."""

import json
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.strategies.tiny_model import write_tiny_model
from tests.system.server import Server, open_database, wait_until

pytestmark = pytest.mark.system
NUM_REQUESTS, NUM_TOKENS = 4, 48  # of each client, one after the other
CLIENTS = {"acme": 3, "globex": 1}


def rows(server: Server) -> list[dict[str, Any]]:
    with closing(open_database(server)) as db:
        db.row_factory = sqlite3.Row
        query = "SELECT u.*, t.name FROM usage_record u JOIN tenant t ON t.id = u.tenant_id ORDER BY u.started_ns"
        return [dict(row) for row in db.execute(query)]


def margin(server: Server) -> dict[str, Any]:
    now = datetime.now(UTC)
    since, until = ((now + timedelta(days=days)).strftime("%Y-%m-%d") for days in (-1, 1))
    command = ("invoice", "margin", "--cost-per-hour", "36", "--since", since, "--until", until)
    table = server.run(*command)
    assert all(f"({name})" in table for name in ("own", "idle", "other"))
    found: dict[str, Any] = json.loads(server.run(*command, "--json"))
    shares = sum(one["engine_ns"] for one in found["tenants"])
    period = (found["until_ns"] - found["since_ns"]) * found["num_engines"]
    assert shares + found["own_ns"] + found["idle_ns"] + found["other_ns"] == period
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    model_dir = tmp_path / "model"
    write_tiny_model(model_dir)
    with Server(tmp_path / "data", model_dir, audit_canary_interval_s="1", audit_replay_percent="100") as running:
        yield running


def test_three_to_one_and_a_killed_gateway(server: Server) -> None:
    model = server.openai("acme").models.list().data[0].id

    def ask(tenant: str, max_tokens: int, stream: bool) -> list[str]:
        body = {"model": model, "prompt": "One, two,", "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}
        headers = {"Authorization": f"Bearer {server.keys[tenant]}"}
        lines = []
        with server.http() as http, http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                told.append(line)
        assert answer.status_code == 200, lines
        return lines

    told: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        clients = [tenant for tenant, num in CLIENTS.items() for _ in range(num)]
        loops = [
            pool.submit(lambda one=tenant: [ask(one, NUM_TOKENS, False) for _ in range(NUM_REQUESTS)])
            for tenant in clients
        ]
        for loop in loops:
            loop.result(timeout=120)
    wait_until(lambda: len(rows(server)) == 4 * NUM_REQUESTS, what="settlement")
    took = dict.fromkeys(CLIENTS, 0)
    for row in rows(server):
        took[row["name"]] += row["engine_ns"]
        assert 0 < row["engine_ns"] < row["finished_ns"] - row["started_ns"]
        assert row["num_decode_steps"] == row["num_completion_tokens"] - 1 == NUM_TOKENS - 1
        assert row["num_prefill_tokens"] + row["num_cached_tokens"] == row["num_prompt_tokens"]
        # At least a block from its first step to its last, and never for longer than it was here.
        assert row["engine_ns"] < row["block_ns"] < 100 * (row["finished_ns"] - row["started_ns"])
    assert 2.0 < took["acme"] / took["globex"] < 4.5, took

    told.clear()
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, tenant, 3_000, True) for tenant in CLIENTS]
        wait_until(lambda: len(told) > 40, 60, "two streams running")
        server.kill()
        for stream in running:
            with pytest.raises(httpx.TransportError):
                stream.result(timeout=30)
    server.start()
    lost = [row for row in rows(server) if row["finish_reason"] == "gateway_lost"]
    assert len(lost) == len(CLIENTS)
    for row in lost:
        assert row["num_completion_tokens"] - 1 == row["num_decode_steps"]
        assert row["engine_ns"] > 0
        assert row["block_ns"] >= row["engine_ns"]
    ask("acme", 8, False)
    time.sleep(2.5)  # it is run again, and the worker tells its counts; they are noted at the end
    assert server.stop() == 0
    found = margin(server)
    assert found["num_estimated"] == 0
    assert {one["tenant"]: one["num_requests"] for one in found["tenants"]} == {"acme": 14, "globex": 5}
    assert sum(one["engine_ns"] for one in found["tenants"]) == sum(row["engine_ns"] for row in rows(server))
    assert found["own_ns"] > 0
    assert found["idle_ns"] > 0
