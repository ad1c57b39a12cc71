"""Stands between a client and a server on a unix socket and holds replies back for as long as a test wants."""

import asyncio
from pathlib import Path
from typing import Self


class DelayingProxy:
    """Bytes to the server pass at once; bytes from it wait while `hold` was called last. Use as a context manager."""

    def __init__(self, path: Path, server: Path) -> None:
        self.path, self._server_path = path, server
        self.num_connections = 0
        self.num_held = 0  # times that bytes of a reply were there and had to wait
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()

    def hold(self) -> None:
        self._open.clear()

    def let_go(self) -> None:
        self._open.set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_unix_server(self._connected, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        server, to_server = await asyncio.open_unix_connection(self._server_path)
        for source, sink, held in ((client, to_server, False), (server, to_client, True)):
            task = asyncio.create_task(self._carry(source, sink, held))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, held: bool) -> None:
        try:
            while data := await source.read(65_536):
                if held and not self._open.is_set():
                    self.num_held += 1
                    await self._open.wait()
                sink.write(data)
                await sink.drain()
        except ConnectionError:  # the other side left: so do we
            pass
        finally:
            sink.close()
