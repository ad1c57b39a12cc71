"""Server-sent events as OpenAI's clients read them: ``data: <one line of JSON>`` and a blank line, at the end [DONE].

A reader that takes nothing for `send_timeout_s` is gone: uvicorn's `send` blocks while its buffer is full, and a
blocked answer would keep blocks and money on hold for ever.
"""

import asyncio
from typing import Any

import msgspec
from starlette.types import Send

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
    """The answer's body as a stream of events; nothing is sent before the first `open`."""

    def __init__(self, send: Send, send_timeout_s: float) -> None:
        self._send = send
        self._send_timeout_s = send_timeout_s
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
            self._send, {"type": "http.response.start", "status": 200, "headers": headers}, self._send_timeout_s
        )

    async def write(self, *frames: bytes) -> None:
        """Raises SlowReaderError."""
        message = {"type": "http.response.body", "body": b"".join(frames), "more_body": True}
        await bounded_send(self._send, message, self._send_timeout_s)

    async def close(self) -> None:
        """[DONE] and the end of the body."""
        message = {"type": "http.response.body", "body": DONE, "more_body": False}
        await bounded_send(self._send, message, self._send_timeout_s)


async def bounded_send(send: Send, message: dict[str, Any], timeout_s: float) -> None:
    """`send` with a limit. Raises SlowReaderError."""
    try:
        async with asyncio.timeout(timeout_s):
            await send(message)
    except TimeoutError as error:
        raise SlowReaderError from error
