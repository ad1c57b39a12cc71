"""Server-sent events as OpenAI's clients read them: ``data: <one line of JSON>`` and a blank line, at the end [DONE].

A reader that takes nothing for `send_timeout_s` is gone: uvicorn's `send` blocks while its buffer is full, and a
blocked answer would keep blocks and money on hold for ever.

A stream may be covered (cover.py): then pieces are filled up and leave at a beat of their own.
"""

import asyncio
from typing import Any

import msgspec
from starlette.types import Send

from gateway.api.cover import Cover

HEARTBEAT_S = 15.0  # a comment after this long without an event, so that no proxy thinks the stream dead
_encoder = msgspec.json.Encoder()


class SlowReaderError(Exception):
    """The client has not taken its bytes in time."""


def event(payload: Any) -> bytes:
    """One event. JSON has no raw line breaks, so one data line always suffices."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": heartbeat\n\n"


class EventStream:
    """The answer's body as a stream of events; nothing is sent before the first `open`. Whoever used it calls `stop`.

    Under a beat, `write` leaves its frames to the next piece and returns; what goes wrong there is raised by a later
    `write` or by `close`.
    """

    def __init__(self, send: Send, send_timeout_s: float, cover: Cover | None = None) -> None:
        self._send = send
        self._send_timeout_s = send_timeout_s
        self._cover = cover
        self._waiting = bytearray()  # for the next beat
        self._closing = False
        self._beating: asyncio.Task[None] | None = None
        self.opened = False

    async def open(self) -> None:
        """Send status 200 and headers, once."""
        if self.opened:
            return
        self.opened = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx would otherwise collect events
        ]
        await bounded_send(
            self._send,
            {"type": "http.response.start", "status": 200, "headers": headers},
            timeout_s=self._send_timeout_s,
        )

    async def write(self, *frames: bytes) -> None:
        """Raises SlowReaderError."""
        if self._cover is None or not self._cover.pace_s:
            await self._piece(b"".join(frames), more=True)
            return
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat(self._cover.pace_s))
        elif self._beating.done():
            await self._beating
        self._waiting += b"".join(frames)

    async def close(self) -> None:
        """[DONE] and the end of the body. Raises SlowReaderError."""
        if self._beating is None:
            await self._piece(DONE, more=False)
            return
        self._waiting += DONE
        self._closing = True
        await self._beating

    async def stop(self) -> None:
        """The beat ends, whatever it still had."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)

    async def _beat(self, pace_s: float) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            piece, last = bytes(self._waiting), self._closing
            self._waiting.clear()
            await self._piece(piece, more=not last)
            if last:
                return
            due_s = max(due_s + pace_s, loop.time())  # after a stall the beat goes on from there
            await asyncio.sleep(due_s - loop.time())

    async def _piece(self, piece: bytes, *, more: bool) -> None:
        body = piece if self._cover is None else self._cover.padded(piece)
        await bounded_send(
            self._send, {"type": "http.response.body", "body": body, "more_body": more}, timeout_s=self._send_timeout_s
        )


async def bounded_send(send: Send, *messages: dict[str, Any], timeout_s: float) -> None:
    """`send` with a limit. Raises SlowReaderError."""
    try:
        async with asyncio.timeout(timeout_s):
            for message in messages:
                await send(message)
    except TimeoutError as error:
        raise SlowReaderError from error
