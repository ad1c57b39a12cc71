"""The gateway's benchmarks: their engine counts like the real one, and a small run of each finds what it should."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine.client import EngineClient
from engine.journal import read_journals
from engine.protocol import SamplingParams, Submit
from gateway.bench.cpu import used_by
from gateway.bench.history import ENTRIES_PER_REQUEST, write_history
from gateway.bench.http import Connection
from gateway.bench.overhead import Plan as OverheadPlan
from gateway.bench.overhead import measure_overhead, open_loop
from gateway.bench.overshoot import Plan, measure_overshoot
from gateway.database import Database
from gateway.stages import STAGES, Stages, passed, read_passages
from gateway.world import real_world
from tenancy.accounts.ledger_check import check_ledger
from tests.gateway.conftest import Stage

GOALS = {
    "tokens_over_budget": 0,
    "entries_sum_nano_usd": 0,
    "ledger_minus_engine_tokens": 0,
    "orphan_holds": 0,
}


@asynccontextmanager
async def scripted(folder: Path, **config: int) -> AsyncIterator[tuple[EngineClient, Path]]:
    whole = {
        "socket_path": str(folder / "s.sock"),
        "journal_dir": str(folder / "journal"),
        "counts_dir": str(folder / "counts"),
        **config,
    }
    process = subprocess.Popen([sys.executable, "-m", "engine.bench.scripted", "--config", json.dumps(whole)])
    client = await EngineClient.connect(folder / "s.sock", timeout_s=20)
    try:
        yield client, folder / "counts"
    finally:
        await client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def submit(name: str, max_tokens: int, seed: int = 0) -> Submit:
    return Submit(name, "domain", b"salt", [1, 2, 3], SamplingParams(max_tokens=max_tokens, seed=seed), nonce=7)


def test_the_scripted_engine_keeps_the_protocol_and_the_journal(short_folder: Path, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        config = {"step_ms": 1, "tokens_per_step": 3, "answer_tokens_min": 5, "answer_tokens_max": 20}
        async with scripted(short_folder, **config) as (client, counts):
            found = {}
            for seed in range(12):
                outputs = [one async for one in await client.submit(submit(f"q{seed}", 10, seed))]
                last = outputs[-1]
                assert sum(len(one.token_ids) for one in outputs) == last.num_completion_tokens <= 10
                assert len("".join(one.text for one in outputs)) == last.num_completion_tokens
                assert {one.nonce for one in outputs} == {7}
                found[f"q{seed}"] = (last.num_completion_tokens, last.finish_reason)
            assert {reason for _, reason in found.values()} == {"stop", "length"}
            assert min(number for number, _ in found.values()) >= 5
            again = [one async for one in await client.submit(submit("again", 10, 3))]
            assert again[-1].num_completion_tokens == found["q3"][0]
            long = await client.submit(submit("long", 100_000, 1))
            async for output in long:
                client.abort("long")
                last = output
            assert last.finish_reason in ("abort", "stop")
            written = read_journals(counts)
            assert {name: written[name].num_completion_tokens for name in found} == {
                n: c for n, (c, _) in found.items()
            }

    runner.run(scenario())


def test_a_small_run_finds_no_token_over_any_budget() -> None:
    """Three gateways, one killed, Valkey emptied: the books agree with the engines' journals all the same."""
    plan = Plan(
        num_tenants=2,
        num_streams=8,
        budget_tokens=1_500,
        max_tokens=100,
        time_limit_s=40,
        kill_after_s=0.6,
        empty_after_s=1.0,
        step_ms=100,
    )
    found = asyncio.run(measure_overshoot(real_world(), plan))
    assert {name: found[name] for name in GOALS} == GOALS, found
    assert found["usable_share"] >= 0.97, found  # a prompt of 25 tokens is more than one percent of this budget
    assert found["num_answers"]["429 insufficient_quota"] == 16, found


@pytest.mark.deep
def test_a_full_run_finds_no_token_over_any_budget() -> None:
    found = asyncio.run(measure_overshoot(real_world(), Plan()))
    assert {name: found[name] for name in GOALS} == GOALS, found
    assert found["usable_share"] >= 0.99, found


@pytest.mark.deep
def test_overhead_is_measured() -> None:
    plan = OverheadPlan(rates=(5,), seconds=2, ledger_rows=(0, 1_000), rate_max=45, stages=True)
    found = asyncio.run(measure_overhead(real_world(), plan, lambda _: None))
    assert found["overhead"][0]["rate_rps"] == 5
    for row in found["overhead"]:
        assert 0 < row["added_p50_ms"] <= row["added_p99_ms"]
        medians = {name: p50 for name, (p50, _) in row["stages_ms"].items()}
        assert 0 < medians["charged"] < medians["inside"] < row["added_p50_ms"] + medians["engine"] + 1
        assert all(used > 0 for used, _ in row["cores_ms"].values())
        assert row["cores_ms"].keys() == {"load", "gateway", "engine", "valkey", "database"}
    measured = [(row["ledger_rows"], row["rate_rps"]) for row in found["overhead"]]
    highest = found["highest_rps"]
    assert measured == [(rows, rate) for rows in (0, 1_000) for rate in (5, highest // 2, highest)]


def test_an_open_loop_does_not_wait_for_slow_answers(runner: asyncio.Runner) -> None:
    """Of a server that stands still for a while, each request that was due meanwhile tells how long it waited."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        begins = loop.time() + 0.25

        async def send() -> bool:
            await asyncio.sleep(max(0.0, begins - loop.time()))
            return True

        run = await open_loop(send, 100, 0.5, now_s=loop.time)
        assert run.num_due == len(run.latencies_ms) == 50
        assert 10 <= sum(one > 50 for one in run.latencies_ms) < 25
        assert run.sustained

        async def never() -> bool:
            await asyncio.sleep(0.2)
            return True

        assert not (await open_loop(never, 50, 0.2, now_s=loop.time)).sustained

    runner.run(scenario())


def test_a_history_is_a_ledger(stage: Stage, runner: asyncio.Runner, request: pytest.FixtureRequest) -> None:
    hall, _ = stage.make()
    url = hall.database.url
    if not hall.database.is_sqlite:
        url = request.getfixturevalue("postgres_server").superuser_of(url)  # foreign keys are not looked up

    async def scenario() -> None:
        database = Database(url)
        await write_history(database, 1_000, lambda _: None)
        await write_history(database, 4_000, lambda _: None, written_rows=1_000)
        await database.dispose()
        async with hall.database.read() as conn:
            checked = await check_ledger(conn)
        assert checked.unbalanced == []
        assert checked.total_nano_usd == 0
        rows = await hall.num_rows()
        assert rows["hold"] == rows["usage_record"] == 4_000 // ENTRIES_PER_REQUEST
        assert (await hall.chat(max_tokens=2)).status == 200

    runner.run(scenario())


def test_the_time_of_a_request_is_the_sum_of_its_stages(tmp_path: Path) -> None:
    """A stage that is passed twice is one; a request that did not go the whole way is left out."""
    clock = iter(range(1_000, 2_000, 7))
    stages = Stages(tmp_path / "stages", lambda: next(clock))
    whole, half, unwatched = dict[str, object](), dict[str, object](), dict[str, object]()
    stages.begin(whole)
    for stage in (*STAGES[:3], "quota", "hold", "hold", *STAGES[4:]):
        passed(whole, stage)
        passed(unwatched, stage)
    stages.keep(whole)
    stages.begin(half)
    passed(half, "authenticate")
    stages.keep(half)
    stages.close()
    (passage,) = read_passages(tmp_path / "stages")
    assert passage.began_ns == 1_000
    assert passage.stages_ns == dict.fromkeys(STAGES, 7) | {"quota": 14, "hold": 14}
    assert not unwatched


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts")
def test_a_process_is_counted_with_its_children_and_once() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); time.sleep(60)"
    with subprocess.Popen(["sh", "-c", '"$0" -c "$1" & wait', sys.executable, spin], stdout=subprocess.PIPE) as child:
        try:
            before = used_by({"me": os.getpid(), "child": os.getpid()})
            assert child.stdout is not None
            child.stdout.readline()
            used = used_by({"me": os.getpid(), "child": child.pid})
        finally:
            subprocess.run(["pkill", "-P", str(child.pid)], check=True)
    assert used["child"].cpu_ns >= 300_000_000
    assert used["me"].cpu_ns - before["me"].cpu_ns < 200_000_000


def test_a_connection_that_the_server_let_go_is_made_anew(runner: asyncio.Runner) -> None:
    """One that has been idle for long is no failed request."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    async def scenario() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        connection = Connection(server.sockets[0].getsockname()[1], None, "key")
        for _ in range(3):
            reply = await connection.get("/healthz")
            assert (reply.status, reply.body, reply.complete) == (200, b"ok", True)
            await asyncio.sleep(0.02)
        connection.close()
        server.close()
        await server.wait_closed()

    runner.run(scenario())
