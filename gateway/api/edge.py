"""The outermost layer around every route: request ids, size and time limits, and the last word on errors.

Pure ASGI. It owns four promises that no handler has to remember:

- every answer carries `x-request-id`, made here (a client's own is never trusted), and is not cached by default;
- headers are bounded (uvicorn takes 70 KB ones), bodies are bounded in bytes and in time;
- an exception becomes the answer that problems.py gives it, or an opaque 500;
- one log line a request, with lengths and ids, never with text.
"""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.problems import (
    BodyTooLargeError,
    HeadersTooLargeError,
    Problem,
    SlowBodyError,
    bug_report,
    internal_problem,
    problem_of,
)
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.stages import Stages
from gateway.world import World, new_id

BODY_TIMEOUT_S = 30.0  # for the whole body
LINGER_S = 2.0  # how long a refused body is still read, so that its sender gets to see the answer
LINGER_BYTES_MAX = 64 * 1024 * 1024

log = structlog.get_logger("gateway.api.edge")


class Edge:
    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        world: World,
        metrics: Metrics,
        body_timeout_s: float = BODY_TIMEOUT_S,
        stages: Stages | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._settings = settings
        self._world = world
        self._body_timeout_s = body_timeout_s
        self._stages = stages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_id("req", self._world.entropy)
        scope.setdefault("state", {})["request_id"] = request_id
        if self._stages is not None:
            self._stages.begin(scope["state"])
        answer = _Answer(send, request_id, scope["state"])
        body = _Body(receive, self._settings.body_bytes_max, self._body_timeout_s)
        started_ns = self._world.monotonic_ns()
        try:
            _check_headers(scope, self._settings.header_bytes_max)
            body.check_declared(scope)
            await self._app(scope, body.receive, answer.send)
        except ClientDisconnect:
            log.info("client.gone", request_id=request_id)
        except Exception as error:
            await self._fail(error, answer, body, request_id)
        finally:
            self._metrics.answered(answer.status)
            if self._stages is not None:
                self._stages.keep(scope["state"])
            log.info(
                "request",
                request_id=request_id,
                method=scope["method"],
                route=_route_name(scope),
                status=answer.status,
                duration_ms=(self._world.monotonic_ns() - started_ns) // 1_000_000,
                num_body_bytes=body.num_bytes,
                num_sent_bytes=answer.num_bytes,
            )

    async def _fail(self, error: Exception, answer: "_Answer", body: "_Body", request_id: str) -> None:
        problem = problem_of(error)
        if problem is None:
            log.error("request.failed", request_id=request_id, **bug_report(error))
            problem = internal_problem(request_id)
        if answer.started:
            # Too late for a status. The server closes the connection, so the client sees an unfinished answer.
            log.warning("answer.broken_off", request_id=request_id, error=type(error).__name__)
            return
        lingers = isinstance(error, BodyTooLargeError)
        await answer.send_problem(problem, more_body=lingers)
        if lingers:
            await body.linger()
            await answer.send({"type": "http.response.body", "body": b"", "more_body": False})


class _Answer:
    """Wraps `send`: stamps headers, remembers what has left."""

    def __init__(self, send: Send, request_id: str, state: dict[str, Any]) -> None:
        self._send = send
        self._request_id = request_id
        self._state = state  # a handler may leave answer_headers here: they go out whatever the answer turns out to be
        self.status = 0
        self.num_bytes = 0

    @property
    def started(self) -> bool:
        return self.status != 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            for name, value in self._state.get("answer_headers", ()):
                headers[name] = value
            headers.setdefault("cache-control", "no-store")
            headers.setdefault("x-content-type-options", "nosniff")
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.num_bytes += len(message.get("body", b""))
        await self._send(message)

    async def send_problem(self, problem: Problem, *, more_body: bool = False) -> None:
        content = problem.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in problem.headers]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": content, "more_body": more_body})


class _Body:
    """Wraps `receive`: counts the body's bytes and its time; once the body is complete it only waits for disconnect."""

    def __init__(self, receive: Receive, limit_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
        self._deadline: float | None = None
        self._complete = False
        self.num_bytes = 0

    def check_declared(self, scope: Scope) -> None:
        """Refuse by Content-Length, before a byte of the body is read."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > self._limit_bytes:
                raise BodyTooLargeError(self._limit_bytes)

    async def receive(self) -> MutableMapping[str, Any]:
        if self._complete:
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._deadline is None:
            self._deadline = loop.time() + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise SlowBodyError from error
        if message["type"] == "http.request":
            self._complete = not message.get("more_body", False)
            self.num_bytes += len(message.get("body", b""))
            if self.num_bytes > self._limit_bytes:
                raise BodyTooLargeError(self._limit_bytes)
        else:
            self._complete = True
        return message

    async def linger(self) -> None:
        """Read and drop what the client still sends: closing at once would reset the answer out of its hands."""
        num_dropped = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while not self._complete and num_dropped <= LINGER_BYTES_MAX:
                    message = await self._receive()
                    num_dropped += len(message.get("body", b""))
                    self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            return


def _route_name(scope: Scope) -> str:
    """The endpoint's name, not the path: a path is a text that the client has chosen."""
    endpoint = scope.get("endpoint")
    return "none" if endpoint is None else str(getattr(endpoint, "__qualname__", type(endpoint).__qualname__))


def _check_headers(scope: Scope, limit_bytes: int) -> None:
    num_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    num_bytes += sum(len(name) + len(value) + 4 for name, value in scope["headers"])  # 4: ": " and CR LF
    if num_bytes > limit_bytes:
        raise HeadersTooLargeError(limit_bytes)
