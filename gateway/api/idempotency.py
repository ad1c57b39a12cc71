"""`Idempotency-Key`: the same request sent again gets the same answer, and is run and billed once.

    key is new                    run; its claim is made in T1 (admission.py), its answer is retained when it is whole
    same key, same body           running: wait for its end, then as the next line; ended: the retained bytes again
    same key, another body        422
    ended, no whole answer        cost nothing: the key is free again and the request runs; else 409, final

A request with a key runs to its end also when its client leaves or stops reading: the client that comes back is the
reason for the key. A stream is replayed as the same events, at once. A replay takes nothing from limits and money; it
is logged before a byte of it leaves.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog
from starlette.types import Message, Receive, Scope, Send

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from gateway.api.admission import show_limits
from gateway.api.auth import Caller
from gateway.api.problems import (
    AnswerLostError,
    ClaimTakenError,
    IdempotencyMismatchError,
    InvalidRequestError,
    RequestRunningError,
)
from gateway.api.streaming import bounded_send
from gateway.database import DatabaseUnavailableError
from gateway.services import Services
from tenancy.idempotency import KEY_CHARS_MAX, Claimed, IdempotencyKey, drop, find_claim, retain

HEADER = b"idempotency-key"
FIRST_LOOK_S, LOOK_MAX_S = 0.05, 1.0  # pauses between looks at a request that runs
GRACE_NS = 2_000_000_000  # between a settlement and the answer's being retained, in another process
DOWNSTREAM_SHARE = 0.8  # of the send timeout: a reader that is slower than this is given up before the exchange is

Run = Callable[[Receive, Send, IdempotencyKey], Awaitable[bool]]
log = structlog.get_logger("gateway.api.idempotency")


def idempotency_key(scope: Scope, tenant_id: str, body: bytes) -> IdempotencyKey | None:
    """The request's key, if it has one. Raises InvalidRequestError."""
    values = [value for name, value in scope["headers"] if name == HEADER]
    if not values:
        return None
    text = values[0].decode("latin-1")
    if len(values) > 1 or not 1 <= len(text) <= KEY_CHARS_MAX or not (text.isascii() and text.isprintable()):
        message = f"Idempotency-Key must be given once, as 1 to {KEY_CHARS_MAX} printable ASCII characters."
        raise InvalidRequestError(message, "Idempotency-Key")
    return IdempotencyKey(tenant_id, text, hashlib.sha256(scope["path"].encode() + b"\0" + body).digest())


async def serve_once(
    services: Services, caller: Caller, key: IdempotencyKey, run: Run, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run the request, or answer it from the one that had the key first. `run` says whether its answer was whole."""
    request_id: str = scope["state"]["request_id"]
    gone = asyncio.create_task(_until_gone(receive))
    try:
        while True:
            found = await _ended(services, key, gone)
            if found is not None and found.answer is not None:
                await _replay(services, caller, found, scope, send)
                return
            if found is not None:
                if found.captured_nano_usd:
                    raise AnswerLostError(found.request_id)
                async with services.database.transaction(key.tenant_id) as conn:
                    await drop(conn, key, found.request_id)
            with suppress(ClaimTakenError):  # another was quicker: look at what it does
                await _run(services, key, run, request_id, send)
                return
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)


async def _ended(services: Services, key: IdempotencyKey, gone: asyncio.Task[None]) -> Claimed | None:
    """The request that has the key, once it has ended; None where there is none.

    Raises IdempotencyMismatchError, and RequestRunningError where it runs for longer than a request may.
    """
    pause_s, waited_s = FIRST_LOOK_S, 0.0
    while True:
        now_ns = services.world.now_ns()
        async with services.database.read(key.tenant_id) as conn:
            found = await find_claim(conn, key, now_ns)
        if found is None:
            return None
        if found.fingerprint != key.fingerprint:
            raise IdempotencyMismatchError
        settled = found.settled_ns is not None and now_ns - found.settled_ns >= GRACE_NS
        if found.answer is not None or settled:
            return found
        if waited_s >= services.settings.hold_ttl_s or gone.done():
            raise RequestRunningError
        await asyncio.wait({gone}, timeout=pause_s)
        waited_s, pause_s = waited_s + pause_s, min(2 * pause_s, LOOK_MAX_S)


async def _run(services: Services, key: IdempotencyKey, run: Run, request_id: str, send: Send) -> None:
    settings = services.settings
    recorder = Recorder(send, settings.send_timeout_s * DOWNSTREAM_SHARE, settings.idempotency_bytes_max)
    whole = False
    try:
        whole = await run(_never_gone, recorder, key)
    finally:
        answer = recorder.answer if whole else None
        await asyncio.shield(_finish(services, key, request_id, recorder.content_type, answer))


async def _finish(
    services: Services, key: IdempotencyKey, request_id: str, content_type: str, answer: bytes | None
) -> None:
    """Retain the answer, or free the key of a request that was settled at no cost. A failure here bills nobody: the
    claim then says what its hold says."""
    with suppress(DatabaseUnavailableError):
        async with services.database.transaction(key.tenant_id) as conn:
            if answer is not None:
                await retain(conn, key, request_id, content_type, answer)
                return
            found = await find_claim(conn, key, services.world.now_ns())
            mine = found is not None and found.request_id == request_id
            if found is not None and mine and found.settled_ns is not None and not found.captured_nano_usd:
                await drop(conn, key, request_id)


async def _replay(services: Services, caller: Caller, found: Claimed, scope: Scope, send: Send) -> None:
    assert found.answer is not None
    assert found.content_type is not None
    principal, now_ns = caller.principal, services.world.now_ns()
    body: dict[str, str | int | bool | list[str]] = {
        "request_id": scope["state"]["request_id"],
        "original_request_id": found.request_id,
        "key_id": principal.key_id,
    }
    async with services.database.transaction(principal.tenant_id) as conn:
        entry = Entry("request.replayed", principal.tenant_id, now_ns, body)
        await append(conn, entry, entropy=services.world.entropy)
    await show_limits(services, caller, scope["state"])
    headers = [
        (b"content-type", found.content_type.encode()),
        (b"content-length", str(len(found.answer)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-bulkhead-replayed", found.request_id.encode()),
    ]
    timeout_s = services.settings.send_timeout_s
    head = {"type": "http.response.start", "status": 200, "headers": headers}
    await bounded_send(send, head, {"type": "http.response.body", "body": found.answer}, timeout_s=timeout_s)


class Recorder:
    """A `send` that keeps what passes, up to `bytes_max`, and goes on when nobody reads any more."""

    def __init__(self, send: Send, timeout_s: float, bytes_max: int) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._bytes_max = bytes_max
        self._parts: list[bytes] | None = []  # None: too large to keep
        self._num_bytes = 0
        self._read = True
        self.content_type = ""

    @property
    def answer(self) -> bytes | None:
        """What was sent; None where that is too much."""
        return None if self._parts is None else b"".join(self._parts)

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.content_type = dict(message["headers"])[b"content-type"].decode()
        else:
            self._keep(message.get("body", b""))
        if self._read:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._send(message)
            except TimeoutError:
                self._read = False
                log.info("reader.left_behind")

    def _keep(self, part: bytes) -> None:
        self._num_bytes += len(part)
        if self._num_bytes > self._bytes_max:
            self._parts = None
        if self._parts is not None:
            self._parts.append(part)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never_gone() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")
