"""A client for any OpenAI-compatible server, as an outsider has it: a URL and a key. It keeps all that it was given,
byte for byte, because a leak may be anywhere in it.

One connection, used again and again by one thread, so that a time to the first token is not one of a handshake.
"""

import contextlib
import http.client
import json
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ANSWER_BYTES_MAX = 16 * 1024 * 1024
RETRIES_MAX = 20
RETRY_WAIT_S_MAX = 30.0
PROBE_TIMEOUT_S = 60.0  # of one socket operation
BEGUN = re.compile(rb'"content"\s*:\s*"[^"]|"finish_reason"\s*:\s*"')  # in a stream, some open with an empty event


class ProbeError(Exception):
    """The server cannot be probed: not there, not OpenAI-compatible, or it refuses."""


class OutOfTimeError(Exception):
    """The run's own time is over."""


@dataclass(frozen=True, slots=True)
class Reply:
    """``ttft_ms``: from sending the request to the first text, or the end, of the answer."""

    status: int
    head: bytes  # headers as they came
    body: bytes
    ttft_ms: float

    @property
    def heard(self) -> bytes:
        """All that came, and the text that a stream had cut into events."""
        return b"\n".join((self.head, self.body, self.text.encode()))

    def events(self) -> list[dict[str, Any]]:
        """A stream's objects, or the one of a whole answer; what is no object, or was cut off, is left out."""
        lines = [line[5:] for line in self.body.splitlines() if line.startswith(b"data:")]
        found = []
        for line in lines or [self.body]:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [event for event in found if isinstance(event, dict)]

    @property
    def id(self) -> str:
        return next((str(event["id"]) for event in self.events() if event.get("id")), "")

    @property
    def cached_tokens(self) -> int:
        """-1 where none are told."""
        for event in self.events():
            details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
            if isinstance(details.get("cached_tokens"), int):
                return int(details["cached_tokens"])
        return -1

    @property
    def text(self) -> str:
        parts = []
        for event in self.events():
            for choice in event.get("choices", []):
                said = choice.get("delta") or choice.get("message") or {}
                parts.append(said.get("content") or "")
        return "".join(parts)

    @property
    def numbers(self) -> str:
        """Every log probability that was told, to the last digit."""
        contents = [
            (choice.get("logprobs") or {}).get("content")
            for event in self.events()
            for choice in event.get("choices", [])
        ]
        return json.dumps([content for content in contents if content])


class Endpoint:
    """Where to connect, and until when. Raises ProbeError for a URL that is none."""

    def __init__(self, url: str, ca: Path | None, seconds: float) -> None:
        parts = urlsplit(url.rstrip("/"))
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ProbeError(f"{url!r} must be https://host:port, or http://host:port")
        if ca is not None and not ca.is_file():
            raise ProbeError(f"there is no certificate authority at {ca}")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.path = parts.path.removesuffix("/v1")
        self._context = ssl.create_default_context(cafile=str(ca) if ca else None)
        self._secure = parts.scheme == "https"
        self.ends_s = time.monotonic() + seconds

    def connection(self) -> http.client.HTTPConnection:
        if self._secure:
            return http.client.HTTPSConnection(self.host, self.port, timeout=PROBE_TIMEOUT_S, context=self._context)
        return http.client.HTTPConnection(self.host, self.port, timeout=PROBE_TIMEOUT_S)

    def left_s(self) -> float:
        """Raises OutOfTimeError."""
        left_s = self.ends_s - time.monotonic()
        if left_s <= 0:
            raise OutOfTimeError
        return left_s


class Client:
    """One tenant's. Not for two threads at once. Raises ProbeError, OutOfTimeError."""

    def __init__(self, endpoint: Endpoint, key: str, model: str = "") -> None:
        self._endpoint = endpoint
        self._key = key
        self._connection: http.client.HTTPConnection | None = None
        self.model = model

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def find_model(self) -> str:
        """The first that the server lists."""
        reply = self.request("GET", "/v1/models")
        if reply.status != 200:
            raise ProbeError(f"GET /v1/models answered {reply.status}: is this an OpenAI-compatible server and key?")
        listed = json.loads(reply.body).get("data") or []
        if not listed:
            raise ProbeError("the server lists no model")
        self.model = str(listed[0]["id"])
        return self.model

    def chat(
        self,
        text: str,
        *,
        max_tokens: int,
        stream: bool = False,
        headers: dict[str, str] | None = None,
        until: Callable[[bytes], bool] = lambda body: False,
        **fields: Any,
    ) -> Reply:
        """Greedy unless ``fields`` say otherwise. ``until`` it is true of the body so far: then the connection is
        closed in the middle. Waits as told where the server asks for patience (429, 503)."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        for _ in range(RETRIES_MAX):
            reply = self.request("POST", "/v1/chat/completions", body | fields, headers, until)
            if reply.status not in (429, 503):
                return reply
            time.sleep(min(_retry_after_s(reply), self._endpoint.left_s()))
        raise ProbeError(f"the server still answers {reply.status} after {RETRIES_MAX} tries: {_told(reply)}")

    def said(self, text: str, **how: Any) -> Reply:
        """`chat`, and ProbeError for anything but an answer."""
        reply = self.chat(text, **how)
        if reply.status != 200:
            raise ProbeError(f"POST /v1/chat/completions answered {reply.status}: {_told(reply)}")
        return reply

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        until: Callable[[bytes], bool] = lambda body: False,
    ) -> Reply:
        """One request; once more where the server had closed the idle connection."""
        self._endpoint.left_s()
        for attempt in (1, 2):
            fresh = self._connection is None
            try:
                return self._request(method, path, body, headers or {}, until)
            except (http.client.HTTPException, OSError) as error:
                self.close()
                if fresh or attempt == 2:
                    where = f"{self._endpoint.host}:{self._endpoint.port}"
                    raise ProbeError(f"{where} does not answer ({error or type(error).__name__})") from error
        raise AssertionError

    def _request(
        self, method: str, path: str, body: Any, headers: dict[str, str], until: Callable[[bytes], bool]
    ) -> Reply:
        if self._connection is None:
            self._connection = self._endpoint.connection()
            self._connection.connect()
        own = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        content = None if body is None else json.dumps(body).encode()
        started = time.perf_counter()
        self._connection.request(method, self._endpoint.path + path, content, own | headers)
        answer = self._connection.getresponse()
        heard = bytearray()
        first_ms: float | None = None
        while piece := answer.read1(65_536):
            heard += piece
            if first_ms is None and BEGUN.search(heard):
                first_ms = (time.perf_counter() - started) * 1_000
            if until(bytes(heard)):
                self.close()
                break
            if len(heard) > ANSWER_BYTES_MAX:
                raise ProbeError(f"an answer is longer than {ANSWER_BYTES_MAX} bytes")
            self._endpoint.left_s()
        if first_ms is None:
            first_ms = (time.perf_counter() - started) * 1_000
        return Reply(answer.status, str(answer.headers).encode(), bytes(heard), first_ms)


def _retry_after_s(reply: Reply) -> float:
    for line in reply.head.decode(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.lower() == "retry-after" and value.strip().isdigit():
            return min(RETRY_WAIT_S_MAX, max(0.2, float(value)))
    return 1.0


def _told(reply: Reply) -> str:
    return reply.body[:300].decode(errors="replace")
