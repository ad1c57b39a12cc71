"""A client for benchmarks: HTTP/1.1 with a kept connection, on the event loop, without a library's overhead."""

import asyncio
import json
import ssl
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

READ_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Reply:
    """`complete` is false where the connection ended first; status 0: before there was one."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False

    @property
    def code(self) -> str:
        """Of an error."""
        with suppress(ValueError, KeyError, TypeError):
            return str(json.loads(self.body)["error"]["code"])
        return ""

    @property
    def retry_after_s(self) -> float:
        return int(self.headers.get("retry-after-ms", 200)) / 1_000


class Connection:
    def __init__(self, port: int, tls: ssl.SSLContext | None, key: str) -> None:
        self._port, self._tls, self._key = port, tls, key
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, body: Any) -> Reply:
        """Never raises for what the other side does."""
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                return await self._send("POST", path, json.dumps(body).encode())
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError):
            self.close()
            return Reply()

    async def get(self, path: str) -> Reply:
        """Never raises for what the other side does."""
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                return await self._send("GET", path, b"")
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError):
            self.close()
            return Reply()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def _send(self, method: str, path: str, content: bytes) -> Reply:
        if self._reader is not None and self._reader.at_eof():
            self.close()  # the server has let an idle connection go
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(
                "127.0.0.1", self._port, ssl=self._tls, server_hostname="127.0.0.1" if self._tls else None
            )
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self._writer.write(head.encode() + content)
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(first.split(" ", 2)[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = bytearray()
        try:
            if headers.get("transfer-encoding") == "chunked":
                while num_bytes := int(await self._reader.readuntil(b"\r\n"), 16):
                    body += (await self._reader.readexactly(num_bytes + 2))[:-2]
                await self._reader.readexactly(2)
            else:
                body += await self._reader.readexactly(int(headers.get("content-length", 0)))
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return Reply(status, headers, bytes(body))
        if headers.get("connection") == "close":
            self.close()
        return Reply(status, headers, bytes(body), complete=True)
