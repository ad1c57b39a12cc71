"""Calls of scripts: replies read back whatever the pieces they come in, and none that is another caller's."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.exceptions import InvalidResponse, NoScriptError, RedisError, ResponseError

from tenancy.quotas import calls
from tenancy.quotas.calls import Calls, packed, parsed
from tests.fakes.delaying_proxy import DelayingProxy
from tests.servers import valkey_socket

__all__ = ["valkey_socket"]

ECHO = "return tonumber(ARGV[1])"
Values = st.recursive(
    st.none() | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For sockets, whose paths may have 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="bh-") as folder:
        yield Path(folder)


def written(value: Any) -> bytes:
    if value is None:
        return b"_\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, bytes):
        return b"$%d\r\n%b\r\n" % (len(value), value)
    return b"*%d\r\n" % len(value) + b"".join(map(written, value))


@asynccontextmanager
async def echoing(server: Path, folder: Path) -> AsyncIterator[tuple[DelayingProxy, Callable[[int], Awaitable[int]]]]:
    async with DelayingProxy(folder / "proxy", server) as proxy:
        redis = Redis(unix_socket_path=str(proxy.path), max_connections=64)
        digest = await redis.script_load(ECHO)
        one = Calls(redis)

        async def ask(number: int) -> int:
            return int(await one.evalsha(digest, [], [number]))

        yield proxy, ask
        await redis.aclose()


async def num_wrong(proxy: DelayingProxy, ask: Callable[[int], Awaitable[int]]) -> int:
    """Callers of whom half are cancelled while replies are held; how many got another's number."""
    random, wrong = Random(1), 0
    for _ in range(4):
        proxy.hold()
        held = proxy.num_held
        asked = {number: asyncio.ensure_future(ask(number)) for number in range(12)}
        async with asyncio.timeout(10):
            while proxy.num_held == held:
                await asyncio.sleep(0.001)
        for number in random.sample(list(asked), 6):
            asked[number].cancel()
        await asyncio.sleep(0)
        proxy.let_go()
        asked |= {number: asyncio.ensure_future(ask(number)) for number in range(12, 24)}
        async with asyncio.timeout(20):
            answers = await asyncio.gather(*asked.values(), return_exceptions=True)
        wrong += sum(isinstance(got, int) and got != number for number, got in zip(asked, answers, strict=True))
    return wrong


def test_replies_stay_with_their_callers(valkey_socket: Path, short_folder: Path) -> None:
    async def scenario() -> None:
        async with echoing(valkey_socket, short_folder) as (proxy, ask):
            assert [await ask(number) for number in range(3)] == [0, 1, 2]
            known = proxy.num_connections
            assert await ask(3) == 3
            assert proxy.num_connections == known  # the same one again
            assert await num_wrong(proxy, ask) == 0

    asyncio.run(scenario())


def test_the_test_sees_connections_that_are_kept(
    valkey_socket: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: one whose caller was cancelled is used again, whatever has come on it since."""

    async def keep(self: Calls, connection: Any) -> None:
        self._free.append(connection)

    async def scenario() -> None:
        async with echoing(valkey_socket, short_folder) as (proxy, ask):
            with monkeypatch.context() as patch:
                patch.setattr(Calls, "_drop", keep)
                patch.setattr(calls, "_is_silent", lambda _: True)
                assert await num_wrong(proxy, ask) > 0

    asyncio.run(scenario())


def test_a_connection_that_the_server_has_closed_is_not_used_again(valkey_socket: Path, short_folder: Path) -> None:
    async def scenario() -> None:
        async with echoing(valkey_socket, short_folder) as (_, ask):
            assert await ask(1) == 1
            admin = Redis(unix_socket_path=str(valkey_socket))
            await admin.client_kill_filter(skipme=True, _type="normal")
            await admin.aclose()
            await asyncio.sleep(0.05)
            assert await ask(2) == 2

    asyncio.run(scenario())


def test_many_callers_wait_and_leave_connections_to_others(valkey_socket: Path, short_folder: Path) -> None:
    """Whoever else uses the client still gets a connection: without one, nobody would see that the store is back."""

    async def scenario() -> None:
        async with DelayingProxy(short_folder / "proxy", valkey_socket) as proxy:
            redis = Redis(unix_socket_path=str(proxy.path), max_connections=calls.CONNECTIONS_MAX + 1)
            digest = await redis.script_load(ECHO)
            one = Calls(redis)
            proxy.hold()
            asked = [asyncio.ensure_future(one.evalsha(digest, [], [number])) for number in range(200)]
            await asyncio.sleep(0.05)
            proxy.let_go()
            assert await asyncio.gather(*asked) == list(range(200))
            assert await redis.ping()
            assert proxy.num_connections == calls.CONNECTIONS_MAX + 1
            await redis.aclose()

    asyncio.run(scenario())


def test_errors_are_the_clients_own(valkey_socket: Path, short_folder: Path) -> None:
    """The connection is as good after them as before."""

    async def scenario() -> None:
        async with echoing(valkey_socket, short_folder) as (proxy, ask):
            await ask(1)
            known = proxy.num_connections
            redis = Redis(unix_socket_path=str(proxy.path))
            one = Calls(redis)
            with pytest.raises(NoScriptError):
                await one.evalsha("0" * 40, [], [])
            failing = await redis.script_load("return redis.error_reply('WRONG of course')")
            with pytest.raises(ResponseError, match="WRONG of course"):
                await one.evalsha(failing, ["a"], [1, "two"])
            with pytest.raises(NoScriptError):
                await one.evalsha("0" * 40, [], [])
            assert proxy.num_connections <= known + 2  # one for script_load, one for all the calls
            await redis.aclose()

    asyncio.run(scenario())


@given(value=Values, before=st.binary(max_size=20))
def test_what_a_script_gives_reads_back(value: Any, before: bytes) -> None:
    data = before + written(value) + b":7\r\n"
    found, at = parsed(data, len(before))
    assert found == value
    assert data[at:] == b":7\r\n"


@given(value=Values)
def test_no_beginning_of_a_reply_is_one(value: Any) -> None:
    data = written(value)
    for end in range(len(data)):
        with pytest.raises(calls._IncompleteError):
            parsed(data[:end])


@given(data=st.binary(max_size=60))
def test_no_bytes_whatever_are_another_error(data: bytes) -> None:
    with suppress(calls._IncompleteError, RedisError):
        parsed(data)


@pytest.mark.parametrize(
    ("pieces", "answer"),
    [
        ([b"*2\r\n:1\r", b"\n:22", b"\r\n"], [1, 22]),
        ([b">2\r\n+moving\r\n:3\r\n:5\r\n"], 5),  # news before it
        ([b">1\r\n+moving\r\n", b":5\r\n"], 5),
        ([b":5\r\n:6\r\n"], InvalidResponse),  # two replies: nobody knows whose the second one is
        ([b"$3\r\nlonger\r\n"], InvalidResponse),
        ([b"*1\r\n" * 20 + b":1\r\n"], InvalidResponse),
        ([b"x"] * 20, RedisError),
        ([b"*5\r\n:1\r\n"], RedisError),  # and then the server is gone
    ],
)
def test_pieces_and_lies(short_folder: Path, pieces: list[bytes], answer: Any) -> None:
    """A server that answers with these: what is not one whole reply ends the connection."""

    talking = set[asyncio.Task[None] | None]()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talking.add(asyncio.current_task())
        while request := await reader.read(65_536):
            if b"EVALSHA" not in request:
                writer.write(b"+OK\r\n" * request.count(b"\r\n$6\r\nCLIENT\r\n") or b"-ERR unknown command\r\n")
                continue
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.01)
            break
        writer.close()
        await writer.wait_closed()

    async def scenario() -> None:
        server = await asyncio.start_unix_server(talk, short_folder / "liar")
        redis = Redis(unix_socket_path=str(short_folder / "liar"), protocol=2, driver_info=None)
        one = Calls(redis)
        if isinstance(answer, type):
            with pytest.raises(answer):
                await one.evalsha("0" * 40, [], [])
            assert not one._free
        else:
            assert await one.evalsha("0" * 40, [], []) == answer
        await redis.aclose()
        server.close()
        await asyncio.gather(*filter(None, talking))

    asyncio.run(scenario())


def test_what_comes_late_is_nobody_elses_reply(short_folder: Path) -> None:
    """A server that answers once more when nobody asks any longer: the connection is not used again."""
    num_told, talking = 0, set[asyncio.Task[None] | None]()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_told
        talking.add(asyncio.current_task())
        while request := await reader.read(65_536):
            if b"EVALSHA" in request:
                num_told += 1
                writer.write(b":%d\r\n" % num_told)
                await asyncio.sleep(0.01)
                writer.write(b":999\r\n")
            else:
                writer.write(b"+OK\r\n")
        writer.close()
        await writer.wait_closed()

    async def scenario() -> None:
        server = await asyncio.start_unix_server(talk, short_folder / "twice")
        redis = Redis(unix_socket_path=str(short_folder / "twice"), protocol=2, driver_info=None)
        one = Calls(redis)
        for number in (1, 2, 3):
            assert await one.evalsha("0" * 40, [], []) == number
            await asyncio.sleep(0.03)
        await redis.aclose()
        server.close()
        await asyncio.gather(*filter(None, talking))

    asyncio.run(scenario())


def test_a_request_is_an_array_of_texts() -> None:
    assert packed(("EVALSHA", "é", 0, -5)) == b"*4\r\n$7\r\nEVALSHA\r\n$2\r\n\xc3\xa9\r\n$1\r\n0\r\n$2\r\n-5\r\n"
