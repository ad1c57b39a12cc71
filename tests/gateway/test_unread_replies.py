"""A caller that is cancelled while its reply is on the way never leaves that reply to the next one. This is how other
services have shown one user's data to another: a pooled connection went back with an unread reply in it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import redis.asyncio.connection
from sqlalchemy import text

from gateway.database import Database
from gateway.host.valkey import connect_redis
from tests.fakes.delaying_proxy import DelayingProxy
from tests.servers import PostgresServer, valkey_socket

__all__ = ["valkey_socket"]

NUM_CALLERS = 24
ROUNDS = 4


@asynccontextmanager
async def valkey(server: Path, folder: Path) -> AsyncIterator[tuple[DelayingProxy, Callable[[int], asyncio.Task[int]]]]:
    """A proxy, and a caller that asks for its own number."""
    async with DelayingProxy(folder / "valkey-proxy", server) as proxy:
        client = connect_redis(f"unix://{proxy.path}")
        for number in range(NUM_CALLERS):
            await client.set(f"number:{number}", number)

        async def ask(number: int) -> int:
            return int(await client.get(f"number:{number}"))

        yield proxy, lambda number: asyncio.create_task(ask(number))
        await client.aclose()


@asynccontextmanager
async def postgres(
    server: PostgresServer, url: str, folder: Path
) -> AsyncIterator[tuple[DelayingProxy, Callable[[int], asyncio.Task[int]]]]:
    async with DelayingProxy(folder / ".s.PGSQL.5432", server.socket_dir / ".s.PGSQL.5432") as proxy:
        database = Database(url.replace(str(server.socket_dir), str(folder)))

        async def ask(number: int) -> int:
            async with database.read() as conn:
                return int((await conn.execute(text(f"SELECT {number}"))).scalar_one())

        yield proxy, lambda number: asyncio.create_task(ask(number))
        await database.dispose()


async def each_gets_its_own(proxy: DelayingProxy, ask: Callable[[int], asyncio.Task[int]], *, seed: int) -> int:
    """Callers of which half are cancelled while replies are held, round after round; how many got another's number."""
    random = Random(seed)
    num_wrong = 0
    for _ in range(ROUNDS):
        proxy.hold()
        held = proxy.num_held
        asked = {number: ask(number) for number in range(NUM_CALLERS // 2)}
        async with asyncio.timeout(10):
            while proxy.num_held == held:
                await asyncio.sleep(0.001)
        for number in random.sample(list(asked), len(asked) // 2):
            asked[number].cancel()
        await asyncio.sleep(0)
        proxy.let_go()
        asked |= {number: ask(number) for number in range(NUM_CALLERS // 2, NUM_CALLERS)}
        async with asyncio.timeout(20):
            answers = await asyncio.gather(*asked.values(), return_exceptions=True)
        for number, answer in zip(asked, answers, strict=True):
            if isinstance(answer, int):
                num_wrong += answer != number
    return num_wrong


def test_valkey_replies_stay_with_their_callers(
    runner: asyncio.Runner, valkey_socket: Path, short_folder: Path
) -> None:
    async def scenario() -> None:
        async with valkey(valkey_socket, short_folder) as (proxy, ask):
            assert await each_gets_its_own(proxy, ask, seed=1) == 0
            assert proxy.num_held >= ROUNDS

    runner.run(scenario())


def test_the_test_sees_a_client_that_keeps_such_connections(
    runner: asyncio.Runner, valkey_socket: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: a connection whose reader was cancelled goes back to the pool as it is."""

    async def keep(*_: object, **__: object) -> None:
        return None

    async def scenario() -> None:
        async with valkey(valkey_socket, short_folder) as (proxy, ask):
            with monkeypatch.context() as patch:
                patch.setattr(redis.asyncio.connection.AbstractConnection, "disconnect", keep)
                assert await each_gets_its_own(proxy, ask, seed=1) > 0

    runner.run(scenario())


def test_database_replies_stay_with_their_callers(
    runner: asyncio.Runner, postgres_server: PostgresServer, short_folder: Path
) -> None:
    url = postgres_server.new_database()

    async def scenario() -> None:
        async with postgres(postgres_server, url, short_folder) as (proxy, ask):
            assert await each_gets_its_own(proxy, ask, seed=1) == 0
            assert proxy.num_held >= ROUNDS

    runner.run(scenario())
