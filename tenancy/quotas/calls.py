"""Calls of scripts on connections kept for them: one request and its reply at a time on each.

The connections are the client's own, made and closed by its pool, with its addresses, passwords and certificates. What
the client does around a command costs more than a script does, twice in every request; here a call is one write and,
as a rule, one read. Used last in, first out. One whose reply did not come whole and alone, whatever the reason, is
closed and never used again: no caller gets another one's reply. They are few, and whoever finds none free waits for
one: the pool's other connections are for everybody else who uses the client.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, NoScriptError, ResponseError

READ_BYTES: Final = 65_536
REPLY_BYTES_MAX: Final = 1024 * 1024
TIMEOUT_S: Final = 2.0  # of one call, its connection included; gateway/breaker.py gives up before
DEPTH_MAX: Final = 8
CONNECTIONS_MAX: Final = 16  # a script takes a fraction of a millisecond


class Calls:
    """Raises what the client raises: RedisError, OSError or TimeoutError."""

    def __init__(self, redis: Redis) -> None:
        self._pool = redis.connection_pool
        self._places = asyncio.Semaphore(CONNECTIONS_MAX)
        self._free: list[AbstractConnection] = []

    async def evalsha(self, digest: str, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        """The script's answer: numbers, bytes, None, lists of them. NoScriptError where the server does not have it."""
        request = packed(("EVALSHA", digest, len(keys), *keys, *arguments))
        async with asyncio.timeout(TIMEOUT_S), self._places:
            connection = await self._take()
            try:
                reply = await _ask(connection, request)
            except BaseException:
                await self._drop(connection)
                raise
            self._free.append(connection)
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    async def _take(self) -> AbstractConnection:
        while self._free:
            connection = self._free.pop()
            if connection.is_connected and _is_silent(connection._reader):
                return connection
            await self._drop(connection)
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        assert isinstance(connection, AbstractConnection)
        return connection

    async def _drop(self, connection: AbstractConnection) -> None:
        """Closed before anybody else can get it, also where the caller is cancelled."""
        closing = asyncio.ensure_future(self._close(connection))
        await asyncio.shield(closing)

    async def _close(self, connection: AbstractConnection) -> None:
        await connection.disconnect(nowait=True)
        await self._pool.release(connection)


def _is_silent(reader: asyncio.StreamReader | None) -> bool:
    """It has neither ended nor said anything that nobody asked for."""
    if reader is None or reader.at_eof() or reader.exception() is not None:
        return False
    return not reader._buffer  # type: ignore[attr-defined]  # what has come and was not read: without a public name


async def _ask(connection: AbstractConnection, request: bytes) -> Any:
    # The client's streams: they are attributes of its connection without a public name.
    reader, writer = connection._reader, connection._writer
    if reader is None or writer is None:
        raise RedisConnectionError("the connection was closed")
    writer.write(request)
    data, at = b"", 0
    while True:
        piece = await reader.read(READ_BYTES)
        if not piece:
            raise RedisConnectionError("the server closed the connection")
        data += piece
        if len(data) > REPLY_BYTES_MAX:
            raise InvalidResponse(f"a reply of more than {REPLY_BYTES_MAX} bytes")
        try:
            while True:
                is_push = data[at : at + 1] == b">"  # news that nobody asked for, between replies
                reply, at = parsed(data, at)
                if not is_push:
                    break
        except _IncompleteError:
            continue
        if at != len(data):
            raise InvalidResponse("more than one reply to one request")
        return reply


def packed(parts: Sequence[str | int]) -> bytes:
    """A request as the protocol wants it: an array of byte strings."""
    pieces = [b"*%d\r\n" % len(parts)]
    for part in parts:
        content = str(part).encode()
        pieces.append(b"$%d\r\n%b\r\n" % (len(content), content))
    return b"".join(pieces)


class _IncompleteError(Exception):
    """The rest of the reply has not arrived."""


def parsed(data: bytes, at: int = 0, depth: int = 0) -> tuple[Any, int]:
    """The reply that begins there, and where the next one would. An error that the server tells is a ResponseError, as
    a value. Raises _IncompleteError, or InvalidResponse for what no script gives."""
    end = data.find(b"\r\n", at)
    if end < 0:
        raise _IncompleteError
    kind, line, at = data[at : at + 1], data[at + 1 : end], end + 2
    if kind == b":":
        return _number(line), at
    if kind in (b"*", b">", b"~"):
        if depth == DEPTH_MAX:
            raise InvalidResponse("a reply with too many lists in each other")
        count = _number(line)
        if count < 0:
            return None, at
        items = []
        for _ in range(count):
            item, at = parsed(data, at, depth + 1)
            items.append(item)
        return items, at
    if kind in (b"$", b"!"):
        num_bytes = _number(line)
        if num_bytes < 0:
            return None, at
        if len(data) < at + num_bytes + 2:
            raise _IncompleteError
        content, at = data[at : at + num_bytes], at + num_bytes + 2
        if data[at - 2 : at] != b"\r\n":
            raise InvalidResponse("a text of another length than was said")
        return (_error(content) if kind == b"!" else content), at
    if kind == b"+":
        return line, at
    if kind == b"-":
        return _error(line), at
    if kind == b"_":
        return None, at
    raise InvalidResponse(f"a reply of an unknown kind: {kind!r}")


def _number(line: bytes) -> int:
    try:
        return int(line)
    except ValueError as error:
        raise InvalidResponse(f"not a number: {line[:40]!r}") from error


def _error(text: bytes) -> ResponseError:
    message = text.decode("utf-8", "replace")
    return NoScriptError(message) if message.startswith("NOSCRIPT") else ResponseError(message)
