"""The HTTPS server: uvicorn, with its own signal handling replaced.

uvicorn re-raises SIGTERM after its shutdown, and our children still have to be stopped then.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from gateway.host.tls import TlsFiles, server_context

BACKLOG = 512


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
