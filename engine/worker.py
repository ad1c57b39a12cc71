"""The engine's process: a unix socket in front, EngineCore.step() behind, one thread each.

    clients  <--frames-->  event loop (main thread)  --commands-->  engine thread: EngineCore, journal
                                                     <--frames ---

A connection that drops aborts its sequences; one that does not read is dropped.

Exit codes: 0 drained, 1 the engine failed, 2 it could not start (one line on stderr says why).
"""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import stat
import threading
import time
from pathlib import Path

from engine.build import MakeObserver, build, unobserved
from engine.config import WorkerConfig
from engine.core import EngineCore
from engine.engine_thread import Connection, Dropped, EngineThread, Received, Wake
from engine.errors import ConfigError, ProtocolError
from engine.journal import Journal
from engine.protocol import Drain, FrameReader, FromWorker, Ready, decode_to_worker, encode_frame
from engine.worker_log import log
from kernels.backend import KernelError
from kernels.memory import give_back_freed

READ_BYTES = 256 * 1024
STATS_INTERVAL_S = 1.0
CLOSE_TIMEOUT_S = 2.0  # for the last frames to leave at exit


class Server:
    """The event loop's side."""

    def __init__(self, config: WorkerConfig, core: EngineCore, journal: Journal, ready: Ready) -> None:
        self._config = config
        self._ready = ready
        self._connections: set[Connection] = set()
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._engine = EngineThread(
            core,
            journal,
            config.num_failures_max,
            self._deliver,
            violating_steps_max=config.violating_steps_max,
            idle_percent=config.idle_percent,
        )
        self._engine.stats = core.stats()

    async def serve(self) -> int:
        listener = await self._listen()
        drain = Drain(self._config.drain_timeout_ms)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._engine.commands.put, drain)
        thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        thread.start()
        print(json.dumps({"ready": True, "epoch": self._ready.epoch, "pid": self._ready.pid}), flush=True)
        stats = asyncio.create_task(self._send_stats())
        await self._stop.wait()
        thread.join()
        stats.cancel()
        listener.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*(self._close(connection) for connection in list(self._connections)))
        self._config.socket_path.unlink(missing_ok=True)
        return self._engine.exit_code

    async def _listen(self) -> asyncio.Server:
        path = self._config.socket_path
        old_mask = os.umask(0o177)  # private from the first moment, not only after chmod
        try:
            listener = await asyncio.start_unix_server(self._serve_client, str(path), limit=READ_BYTES)
        finally:
            os.umask(old_mask)
        path.chmod(0o600)
        return listener

    def _run_engine(self) -> None:
        try:
            self._engine.run()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is gone already
                self._loop.call_soon_threadsafe(self._stop.set)

    def _deliver(self, frames: dict[Connection, bytes], to_all: bytes) -> None:
        """Called by the engine thread."""

        def send() -> None:
            if to_all:
                for connection in self._connections:
                    connection.send(to_all)
            for connection, data in frames.items():
                connection.send(data)

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(send)

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        self._connections.add(connection)
        frames = FrameReader()
        try:
            hello: list[FromWorker] = [self._ready]
            if self._engine.stats is not None:
                hello.append(self._engine.stats)
            connection.send(b"".join(encode_frame(message) for message in hello))
            while data := await reader.read(READ_BYTES):
                for body in frames.feed(data):
                    self._engine.commands.put(Received(connection, decode_to_worker(body)))
        except ProtocolError as error:
            log(f"closing a connection: {error}")
        except ConnectionError:
            pass
        finally:
            self._connections.discard(connection)
            self._engine.commands.put(Dropped(connection))
            writer.close()

    async def _send_stats(self) -> None:
        while True:
            await asyncio.sleep(STATS_INTERVAL_S)
            self._engine.commands.put(Wake())  # an idle engine looks at its observer's counters, too
            if self._engine.stats is not None:
                frame = encode_frame(self._engine.stats)
                for connection in self._connections:
                    connection.send(frame)

    async def _close(self, connection: Connection) -> None:
        with contextlib.suppress(ConnectionError):
            await connection.writer.drain()
            connection.writer.close()
            await connection.writer.wait_closed()


def clear_socket(path: Path) -> None:
    """Remove a socket that nobody listens on. Raises ConfigError if somebody does, or if it is no socket at all."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is in the way and no socket: choose another socket path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
        else:
            raise ConfigError(f"another engine worker listens on {path}")


def run_worker(config: WorkerConfig, make_observer: MakeObserver = unobserved) -> int:
    """Serve until drained; returns the exit code. Blocks; call it in the main thread of a process of its own."""
    try:
        clear_socket(config.socket_path)
        core, ready = build(config, make_observer, epoch=f"{time.time_ns():020d}-{secrets.token_hex(8)}")
        give_back_freed()
        return asyncio.run(_serve(config, core, Journal(config.journal_dir, ready.epoch), ready))
    except (ConfigError, KernelError, OSError) as error:
        log(str(error))
        return 2


async def _serve(config: WorkerConfig, core: EngineCore, journal: Journal, ready: Ready) -> int:
    return await Server(config, core, journal, ready).serve()
