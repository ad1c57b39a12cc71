"""A client below HTTP: calls an ASGI app in this process and decides when bytes arrive, stall or stop.

httpx's own ASGI transport waits for the whole answer, so it can neither leave in the middle nor refuse to read.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of every event; [DONE] as the text "[DONE]". Comments are left out."""
        found: list[Any] = []
        for block in self.body.decode().split("\n\n"):
            if block.startswith("data: "):
                data = block.removeprefix("data: ")
                found.append(data if data == "[DONE]" else json.loads(data))
        return found


@dataclass
class Call:
    """One request. `leave_after` bytes of answer the client is gone; after `stall_after` it reads no more."""

    method: str
    path: str
    headers: dict[str, str]
    chunks: list[bytes]
    leave_after: int | None = None
    stall_after: int | None = None
    leave_at: asyncio.Event = field(default_factory=asyncio.Event)
    on_sent: Callable[[Answer], None] | None = None
    stall_body: bool = False  # never send the last chunk

    async def run(self, app: ASGIApp) -> Answer:
        answer = Answer()
        position = 0
        done = asyncio.Event()

        async def receive() -> Message:
            nonlocal position
            if position < len(self.chunks):
                position += 1
                more = position < len(self.chunks) or self.stall_body
                return {"type": "http.request", "body": self.chunks[position - 1], "more_body": more}
            waits = [asyncio.create_task(done.wait()), asyncio.create_task(self.leave_at.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if self.leave_at.is_set():
                return  # as uvicorn does: bytes for a client that has left vanish
            if self.stall_after is not None and len(answer.body) >= self.stall_after and answer.status:
                await asyncio.Event().wait()
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode().lower(): v.decode() for k, v in message["headers"]}
            else:
                answer.body += message.get("body", b"")
                if not message.get("more_body", False):
                    answer.complete = True
                    done.set()
            if self.on_sent is not None:
                self.on_sent(answer)
            if self.leave_after is not None and len(answer.body) >= self.leave_after:
                self.leave_at.set()
            await asyncio.sleep(0)

        path, _, query = self.path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "https",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in self.headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8443),
            "state": {},
        }
        await app(scope, receive, send)
        return answer
