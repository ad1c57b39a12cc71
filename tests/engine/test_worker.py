"""A real worker process on a real unix socket."""

import asyncio
import json
import os
import signal
import socket
import stat
from pathlib import Path

import pytest

from engine.client import EngineClient, Generation
from engine.errors import EngineConnectError, EngineGoneError
from engine.journal import read_journals
from engine.protocol import SamplingParams, Submit, TokenOutput
from tests.engine.worker_process import wait_ended, worker
from tests.kernels.native import isas


def make(
    name: str, max_tokens: int, *, seed: int = 0, domain: str = "a", prompt: tuple[int, ...] = (5, 6, 7)
) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)
    return Submit(name, domain, b"salt", list(prompt), sampling)


async def collect(generation: Generation) -> list[TokenOutput]:
    return [output async for output in generation]


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def test_eight_sequences_some_aborted(tiny_model_dir: Path, tmp_path: Path) -> None:
    async def run() -> None:
        client = await EngineClient.connect(tmp_path / "engine.sock", timeout_s=60)
        other = await EngineClient.connect(tmp_path / "engine.sock", timeout_s=10)
        ready = client.ready
        assert (ready.pid, ready.vocab_size, ready.context_max) == (process.pid, 320, 4096)
        assert (ready.num_blocks, ready.dtype) == (400, "float32")
        assert (ready.isolation, ready.kernels) == (
            ("bitwise", f"native-{isas()[0]}") if isas() else ("relaxed", "torch-cpu")
        )
        assert ready.model_digest.startswith("sha256:")
        assert stat.S_IMODE(os.stat(tmp_path / "engine.sock").st_mode) == 0o600

        names = [f"s{index}" for index in range(8)]
        streams = {n: await client.submit(make(n, 60, seed=i, domain="ab"[i % 2])) for i, n in enumerate(names)}
        with pytest.raises(ValueError, match="in use"):
            await client.submit(make("s1", 1))
        duplicate = await collect(await other.submit(make("s1", 1)))
        assert [output.error for output in duplicate] == ["invalid_input"]
        await anext(streams["s0"])
        for name in ("s0", "s3"):
            client.abort(name)
        client.abort("unknown")
        other.abort("s1")  # not its own: without effect
        endings = dict(zip(names, await asyncio.gather(*(collect(stream) for stream in streams.values())), strict=True))
        for name, outputs in endings.items():
            last = outputs[-1]
            if name in ("s0", "s3"):
                assert last.finish_reason == "abort"
                assert last.num_completion_tokens < 60
            else:
                assert (last.finish_reason, last.num_completion_tokens, len(tokens(outputs))) == ("length", 60, 60)
                assert last.num_prompt_tokens == 3
        records = read_journals(tmp_path / "journal")
        for name, outputs in endings.items():
            last, record = outputs[-1], records[name]
            assert (record.num_completion_tokens, record.finish_reason) == (
                last.num_completion_tokens,
                last.finish_reason,
            )

        again = await collect(await client.submit(make("again", 60, seed=5)))
        assert tokens(again) == tokens(endings["s5"]), "the seed reproduces, alone as among others"

        too_long = await collect(await client.submit(make("long", 5000)))
        assert [(output.finish_reason, output.error) for output in too_long] == [("error", "too_long")]

        slow = await client.submit(make("slow", 50))
        quick = await client.submit(make("quick", 50))
        await collect(quick)
        await asyncio.sleep(0.1)
        assert len(await collect(slow)) == 1, "what a slow reader left is one piece"

        await other.close()
        endless = await client.submit(make("endless", 3000))
        await anext(endless)
        await client.close()
        with pytest.raises(EngineGoneError):
            await collect(endless)
        third = await EngineClient.connect(tmp_path / "engine.sock", timeout_s=10)
        async with asyncio.timeout(10):
            while third.stats is None or third.stats.num_running:
                await asyncio.sleep(0.05)
        assert third.stats.num_blocks_free == 400
        num_served = sum(outputs[-1].num_prompt_tokens for outputs in endings.values())
        assert third.stats.num_prompt_tokens == num_served + 3 * 4
        assert read_journals(tmp_path / "journal")["endless"].finish_reason == "abort"

        last_one = await third.submit(make("last", 400))
        await anext(last_one)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        refused = await third.submit(make("late", 1))
        assert [output.error for output in await collect(refused)] == ["draining"]
        assert (await collect(last_one))[-1].finish_reason == "length", "what runs is finished"
        assert await wait_ended(process) == 0
        await asyncio.wait_for(third.closed.wait(), 5)
        await third.close()
        assert not (tmp_path / "engine.sock").exists()

    with worker(tmp_path, tiny_model_dir) as process:
        asyncio.run(run())
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["ready"] is True


def test_kill_9_tells_the_counts_and_the_journal_knows_no_less(tiny_model_dir: Path, tmp_path: Path) -> None:
    async def run() -> None:
        client = await EngineClient.connect(tmp_path / "engine.sock", timeout_s=60)
        streams = [await client.submit(make(f"s{index}", 3000, seed=index)) for index in range(8)]
        received: dict[str, int] = {}

        async def collect_counts(stream: Generation) -> None:
            async for output in stream:
                received[stream.sequence_id] = output.num_completion_tokens

        async def read(stream: Generation) -> None:
            with pytest.raises(EngineGoneError) as gone:
                await collect_counts(stream)
            assert gone.value.num_completion_tokens == received[stream.sequence_id]
            assert gone.value.num_prompt_tokens == 3

        readers = [asyncio.create_task(read(stream)) for stream in streams]
        while len(received) < 8 or min(received.values()) < 20:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        await asyncio.wait_for(asyncio.gather(*readers), 10)
        assert client.closed.is_set()
        with pytest.raises(EngineGoneError):
            await client.submit(make("after", 1))
        await client.close()
        records = read_journals(tmp_path / "journal")
        for name, num_received in received.items():
            assert num_received <= records[name].num_completion_tokens
            assert records[name].num_prompt_tokens == 3
            assert records[name].finish_reason is None
        with pytest.raises(EngineConnectError, match="no engine worker answered"):
            await EngineClient.connect(tmp_path / "engine.sock", timeout_s=0.3)

    with worker(tmp_path, tiny_model_dir) as process:
        asyncio.run(run())
    assert (tmp_path / "engine.sock").exists(), "a killed worker leaves its socket"

    async def run_again() -> None:
        client = await EngineClient.connect(tmp_path / "engine.sock", timeout_s=60)
        stream = await client.submit(make("s", 2000))
        await anext(stream)
        client.drain(0)
        outputs = await collect(stream)
        assert outputs[-1].finish_reason == "abort", "the drain's time was up"
        assert await wait_ended(process) == 0
        await client.close()

    with worker(tmp_path, tiny_model_dir) as process:
        asyncio.run(run_again())


def test_garbage_closes_its_own_connection_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    async def run() -> None:
        client = await EngineClient.connect(tmp_path / "engine.sock", timeout_s=60)
        stream = await client.submit(make("s", 300))
        for garbage in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x02{}", b"GET / HTTP/1.1\r\n\r\n"):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "engine.sock"))
            writer.write(garbage)
            await asyncio.wait_for(reader.read(-1), 10)  # until the worker closes
            writer.close()
        assert (await collect(stream))[-1].finish_reason == "length"
        await client.close()

    with worker(tmp_path, tiny_model_dir):
        asyncio.run(run())


def test_a_worker_that_cannot_start_says_why_in_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    in_the_way = tmp_path / "file"
    in_the_way.mkdir()
    (in_the_way / "engine.sock").write_text("")
    busy = tmp_path / "busy"
    busy.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(busy / "engine.sock"))
    listener.listen()
    cases = [
        (tmp_path, tmp_path / "nowhere", "there is no model folder"),
        (tmp_path, broken, "tokenizer.json"),
        (in_the_way, tiny_model_dir, "no socket"),
        (busy, tiny_model_dir, "another engine worker"),
    ]
    started = []
    for folder, model_dir, message in cases:
        context = worker(folder, model_dir)
        started.append((context, context.__enter__(), message))
    try:
        for _, process, message in started:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 2
            assert message in errors
            assert errors.count("\n") == 1, errors
    finally:
        for context, _, _ in started:
            context.__exit__(None, None, None)
        listener.close()


def test_kernels_can_be_chosen(tiny_model_dir: Path, tmp_path: Path) -> None:
    async def ready() -> tuple[str, str]:
        client = await EngineClient.connect(tmp_path / "engine.sock", timeout_s=60)
        await client.close()
        return client.ready.kernels, client.ready.isolation

    with worker(tmp_path, tiny_model_dir, kernels="torch"):
        assert asyncio.run(ready()) == ("torch-cpu", "relaxed")
    with worker(tmp_path, tiny_model_dir, kernels="abacus") as process:
        _, errors = process.communicate(timeout=60)
        assert "ConfigError" in errors or "kernels must be one of" in errors
