"""Things break: every client gets an ending, money adds up, the log verifies, nothing is left running."""

import json
import os
import signal
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.system.server import Server, open_database, wait_until

pytestmark = pytest.mark.system
LONG = "Tell me a very long story about a lighthouse."


def ledger(server: Server) -> dict[str, int]:
    """What must hold after every fault: entries sum to zero, and how many holds are in which state."""
    with closing(open_database(server)) as db:
        (total,) = db.execute("SELECT coalesce(sum(amount_nano_usd), 0) FROM ledger_entry").fetchone()
        assert total == 0
        unbalanced = db.execute(
            "SELECT transaction_id FROM ledger_entry GROUP BY transaction_id HAVING sum(amount_nano_usd) != 0"
        ).fetchall()
        assert unbalanced == []
        return dict(db.execute("SELECT state, count(*) FROM hold GROUP BY state").fetchall())


def charged(server: Server) -> list[tuple[str, int, str]]:
    with closing(open_database(server)) as db:
        return db.execute(
            "SELECT request_id, num_completion_tokens, finish_reason FROM usage_record ORDER BY started_ns"
        ).fetchall()


class Stream:
    """One raw streaming request, read frame by frame."""

    def __init__(self, server: Server, tenant: str, max_tokens: int = 600) -> None:
        self.http = server.http()
        self.body = {
            "model": server.openai(tenant).models.list().data[0].id,
            "messages": [{"role": "user", "content": LONG}],
            "max_tokens": max_tokens,
            "stream": True,
        }
        self.headers = {"Authorization": f"Bearer {server.keys[tenant]}"}
        self.started = False
        self.lines: list[str] = []

    def read(self, stop_after: int | None = None) -> "Stream":
        with (
            self.http,
            self.http.stream("POST", "/v1/chat/completions", json=self.body, headers=self.headers) as answer,
        ):
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.lines.append(line)
                    self.started = len(self.lines) > 3
                if stop_after is not None and len(self.lines) >= stop_after:
                    break
        return self

    @property
    def request_id(self) -> str:
        event = json.loads(self.lines[0].removeprefix("data: "))
        return str(event["id"]).replace("chatcmpl-", "req_")

    @property
    def num_deltas(self) -> int:
        return sum('"content":"' in line and '"content":""' not in line for line in self.lines)


def test_a_killed_worker_ends_every_stream_and_comes_back(tmp_path: Path, model_dir: Path) -> None:
    with Server(tmp_path / "data", model_dir) as server:
        streams = [Stream(server, ("acme", "globex")[i % 2]) for i in range(8)]
        warm = {"model": streams[0].body["model"], "prompt": "One, two,", "max_tokens": 8}
        server.openai("globex").completions.create(**warm)  # type: ignore[call-overload]
        time.sleep(1.5)  # the worker tells its counts every second; what came later dies with it
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(stream.read) for stream in streams]
            wait_until(lambda: all(stream.started for stream in streams), 60, "eight streams running")
            server.children()["worker"].kill()
            for future in running:
                future.result(timeout=30)
        for stream in streams:
            assert '"error"' in stream.lines[-2]
            assert stream.lines[-1] == "data: [DONE]"
        wait_until(lambda: "pending" not in ledger(server), what="settlement")
        assert ledger(server) == {"captured": 9}
        # Whole characters only are sent, so a delta may hold more than one token, never less.
        for (_, num_tokens, _), stream in zip(charged(server)[1:], streams, strict=True):
            assert num_tokens >= 1
            assert len(stream.lines) > 3
        wait_until(lambda: is_ready(server), 60, "the worker being back")
        answer = server.openai("acme").completions.create(
            model=streams[0].body["model"], prompt="One, two,", max_tokens=8, temperature=0
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8
        assert server.stop() == 0
        logged = server.run("audit", "log", "--kind", "audit.heartbeat").splitlines()
        beats = [json.loads(line)["body"] for line in logged]
        audited = {beat["epoch"]: beat["num_steps"] for beat in beats}  # the last one of each worker stays
        assert len(audited) == 2
        assert all(num_steps > 0 for num_steps in audited.values())
        server.run("audit", "verify")


def is_ready(server: Server) -> bool:
    with server.http() as http:
        return http.get("/readyz").status_code == 200


def test_a_killed_gateway_leaves_nothing_and_loses_nothing(tmp_path: Path, model_dir: Path) -> None:
    with Server(tmp_path / "data", model_dir) as server:
        children = server.children()
        assert set(children) == {"worker", "valkey"}
        streams = [Stream(server, "acme") for _ in range(3)]
        streams[0].body |= {"n": 2, "ignore_eos": True}

        def read(stream: Stream) -> None:
            with pytest.raises(httpx.TransportError):
                stream.read()

        def both_answers_run() -> bool:
            return any(
                '"index":1,"delta":{"content":"' in line and '"content":""' not in line for line in streams[0].lines
            )

        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(read, stream) for stream in streams]
            wait_until(lambda: all(stream.started for stream in streams), 60, "three streams running")
            wait_until(both_answers_run, 60, "the second answer of the first stream")
            server.kill()
            for future in running:
                future.result(timeout=30)
        wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children.values()))
        assert ledger(server) == {"pending": 3}
        server.start()
        assert ledger(server) == {"captured": 3}
        rows = {request_id: (num_tokens, reason) for request_id, num_tokens, reason in charged(server)}
        for stream in streams:  # they were admitted in any order
            num_tokens, reason = rows[stream.request_id]
            assert reason == "gateway_lost"
            assert num_tokens >= stream.num_deltas
        assert server.stop() == 0
        server.run("audit", "verify")


def test_sigterm_drains_and_a_second_start_is_quick(tmp_path: Path, model_dir: Path) -> None:
    with Server(tmp_path / "data", model_dir) as server:
        children = server.children()
        stream = Stream(server, "globex", max_tokens=40)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(stream.read)
            wait_until(lambda: stream.started, 60, "a stream running")
            assert server.stop() == 0
            running.result(timeout=5)
        assert stream.lines[-1] == "data: [DONE]"
        assert '"error"' not in stream.lines[-2]
        assert not any(psutil.pid_exists(child.pid) for child in children.values())
        keys = dict(server.keys)
        server.start()
        assert server.ready_s < 20  # 10 on an idle machine; tests share theirs
        assert "Shown once" not in server.output
        assert keys["acme"] not in server.output
        assert server.openai("acme").models.list().data
        assert server.stop() == 0


def test_a_client_that_leaves_stops_its_sequence(tmp_path: Path, model_dir: Path) -> None:
    with Server(tmp_path / "data", model_dir) as server:
        stream = Stream(server, "acme", max_tokens=2000).read(stop_after=6)
        wait_until(lambda: "pending" not in ledger(server), what="settlement")
        [(_, num_tokens, reason)] = charged(server)
        assert reason == "client_gone"
        assert stream.num_deltas <= num_tokens < 200
        assert server.stop() == 0


def test_without_valkey_or_database_nothing_is_served(tmp_path: Path, model_dir: Path) -> None:
    with Server(tmp_path / "data", model_dir) as server:
        valkey = server.children()["valkey"]
        model = server.openai("acme").models.list().data[0].id
        valkey.suspend()
        try:
            with pytest.raises(openai.InternalServerError) as refused:
                server.openai("acme").completions.create(model=model, prompt="a", max_tokens=1)
        finally:
            valkey.resume()
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) >= 1
        valkey.kill()
        wait_until(lambda: is_ready(server), 20, "Valkey being restarted")
        blocker = sqlite3.connect(server.data_dir / "bulkhead.db", isolation_level=None)
        blocker.execute("BEGIN EXCLUSIVE")
        with pytest.raises(openai.InternalServerError) as refused:
            server.openai("acme").completions.create(model=model, prompt="a", max_tokens=1)
        blocker.rollback()
        blocker.close()
        assert refused.value.status_code == 503
        assert "retry-after" in refused.value.response.headers
        assert server.openai("acme").completions.create(model=model, prompt="a", max_tokens=1).usage is not None
        wait_until(lambda: "pending" not in ledger(server), what="settlement")
        assert len(charged(server)) == 1
        assert server.stop() == 0


def test_a_taken_port_a_bad_folder_and_a_missing_model_are_one_line_each(tmp_path: Path, model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = Server(tmp_path / "data", model_dir, port=str(taken.getsockname()[1]))
        said = server.run("serve", expect=1)
        assert "cannot listen" in said
        assert said.count("\n") == 1
    (tmp_path / "file").write_text("")
    said = Server(tmp_path / "file", model_dir).run("serve", expect=1)
    assert "cannot be written" in said
    assert said.count("\n") == 1
    said = Server(tmp_path / "data", tmp_path / "nothing").run("serve", expect=1)
    assert "holds no model" in said
    assert said.count("\n") == 1
    said = Server(tmp_path / "data", model_dir, block_size="none").run("serve", expect=1)
    assert "BULKHEAD_BLOCK_SIZE" in said


def test_ctrl_c_while_starting_leaves_nothing(tmp_path: Path, model_dir: Path) -> None:
    import subprocess
    import sys

    server = Server(tmp_path / "data", model_dir)
    process = subprocess.Popen([sys.executable, "-m", "gateway", "serve"], env=server.env, stdout=subprocess.DEVNULL)
    parent = psutil.Process(process.pid)
    wait_until(lambda: len(parent.children()) == 2, 30, "both children started")
    children = parent.children()
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(20) == 0
    assert not any(psutil.pid_exists(child.pid) for child in children)
