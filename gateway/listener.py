"""The listening socket and the HTTPS server on it.

The socket is bound before anything slow happens, so that a taken port is the first thing a user hears of. uvicorn's
own signal handling is replaced: it re-raises SIGTERM after its shutdown, and our children still have to be stopped.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from gateway.tls import TlsFiles, server_context

BACKLOG = 512


class PortError(Exception):
    """The address cannot be bound; the message says what to do."""


def bind(host: str, port: int) -> socket.socket:
    """A bound, not yet listening TCP socket. Raises PortError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise PortError(
            f"cannot listen on {host}:{port} ({error.strerror}): stop what uses it, or choose another BULKHEAD_PORT"
        ) from error
    return listener


class HttpsServer(uvicorn.Server):
    """`listening` is set once connections are accepted."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def https_server(app: ASGIApp, tls: TlsFiles, drain_timeout_s: int) -> HttpsServer:
    config = uvicorn.Config(
        app,
        ssl_certfile=tls.certificate,
        ssl_keyfile=str(Path(tls.key)),
        ssl_context_factory=lambda _config, _default: server_context(tls),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        backlog=BACKLOG,
        # Without this, one idle keep-alive TLS client makes SIGTERM wait for ever.
        timeout_graceful_shutdown=drain_timeout_s,
        timeout_keep_alive=75,
    )
    return HttpsServer(config)
