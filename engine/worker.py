"""The engine's process: a unix socket in front, EngineCore.step() behind, one thread each.

    clients  <--frames-->  event loop (main thread)  --commands-->  engine thread: EngineCore, journal
                                                     <--frames ---

The engine thread takes all waiting commands, makes one step, writes the journal, then hands each connection its
frames of the step as one piece of bytes. A connection that drops aborts its sequences; one that does not read is
dropped.

Exit codes: 0 drained, 1 the engine failed, 2 it could not start (one line on stderr says why).
"""

import asyncio
import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import stat
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.config import WorkerConfig
from engine.core import EngineCore, refusal
from engine.errors import ConfigError, ProtocolError
from engine.events import NullObserver, Observer
from engine.journal import Journal, record_of
from engine.model_runner import ModelRunner
from engine.order import POLICIES
from engine.protocol import (
    PROTOCOL_VERSION,
    Abort,
    Drain,
    FrameReader,
    FromWorker,
    Incident,
    Ready,
    Stats,
    Submit,
    TokenOutput,
    ToWorker,
    decode_to_worker,
    encode_frame,
)
from engine.tokenizer import Tokenizer
from engine.weights import model_digest

READ_BYTES = 256 * 1024
SEND_BUFFER_BYTES_MAX = 64 * 1024 * 1024  # a client that leaves this much unread is gone
STATS_INTERVAL_S = 1.0
CLOSE_TIMEOUT_S = 2.0  # for the last frames to leave at exit
ISOLATION = "relaxed"  # rows may depend on neighbours in their last bits; see docs
KERNELS = "torch-cpu"


@dataclass(slots=True, eq=False)
class Connection:
    """A client, as the event loop sees it."""

    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        transport = self.writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > SEND_BUFFER_BYTES_MAX:
            transport.abort()
            return
        self.writer.write(data)


@dataclass(frozen=True, slots=True)
class Received:
    connection: Connection
    message: ToWorker


@dataclass(frozen=True, slots=True)
class Dropped:
    connection: Connection


@dataclass(frozen=True, slots=True)
class Wake:
    """Nothing but a reason to look at the clock again."""


MakeObserver = Callable[[int, int], Observer]
Command = Received | Dropped | Drain | Wake


@dataclass(slots=True)
class EngineThread:
    """Owns the core: everything that touches it happens in `run`."""

    core: EngineCore
    journal: Journal
    num_failures_max: int
    deliver: Callable[[dict[Connection, bytes], bytes], None]  # (frames by connection, frames for everybody)
    commands: "queue.SimpleQueue[Command]" = field(default_factory=queue.SimpleQueue)
    stats: Stats | None = None
    exit_code: int = 0
    _owners: dict[str, Connection] = field(default_factory=dict)
    _drain_until_s: float | None = None

    def run(self) -> int:
        """Until drained (0) or broken (1). Whatever happens, every sequence gets an ending if its client is there."""
        try:
            while self._turn():
                pass
        except BaseException as error:
            log(f"engine thread failed: {type(error).__name__}: {error}")
            self.exit_code = 1
            with contextlib.suppress(Exception):
                self._emit(self.core.abort_all("engine_failure"), [])
            if not isinstance(error, OSError):
                raise
        return self.exit_code

    def _turn(self) -> bool:
        """Commands, then one step. False: it is time to go."""
        outputs: list[TokenOutput] = []
        for command in self._take_commands():
            outputs += self._obey(command)
        self._emit(outputs, [])
        if self._drain_until_s is not None and time.monotonic() >= self._drain_until_s:
            self._emit(self.core.abort_all(), [])
        if self.core.has_work:
            result = self.core.step()
            if result.failure:
                log(f"step {self.core.step_number} failed:\n{result.failure}")
            self._emit(result.outputs, result.incidents)
            if self.core.num_failures_in_a_row >= self.num_failures_max:
                log(f"{self.core.num_failures_in_a_row} steps in a row failed: giving up")
                self._emit(self.core.abort_all("engine_failure"), [])
                self.exit_code = 1
                return False
        elif self._drain_until_s is not None:
            return False
        return True

    def _take_commands(self) -> list[Command]:
        commands: list[Command] = []
        if not self.core.has_work and self._drain_until_s is None:
            commands.append(self.commands.get())
        while True:
            try:
                commands.append(self.commands.get_nowait())
            except queue.Empty:
                return commands

    def _obey(self, command: Command) -> list[TokenOutput]:
        match command:
            case Received(connection, Submit() as submit):
                self._submit(connection, submit)
            case Received(connection, Abort(sequence_id)):
                if self._owners.get(sequence_id) is connection:
                    output = self.core.abort(sequence_id)
                    return [output] if output is not None else []
            case Received(_, Drain(timeout_ms)) | Drain(timeout_ms):
                until_s = time.monotonic() + timeout_ms / 1000
                self._drain_until_s = min(until_s, self._drain_until_s or until_s)
            case Dropped(connection):
                dropped = [name for name, owner in self._owners.items() if owner is connection]
                return [output for name in dropped if (output := self.core.abort(name)) is not None]
            case Wake():
                pass
        return []

    def _submit(self, connection: Connection, submit: Submit) -> None:
        if self._drain_until_s is not None:
            refused: TokenOutput | None = refusal(submit.sequence_id, "draining")
        else:
            refused = self.core.add(submit)
        if refused is None:
            self._owners[submit.sequence_id] = connection
        else:  # to this connection only, and not to the journal: the id may be in use by another
            self.deliver({connection: encode_frame(refused)}, b"")

    def _emit(self, outputs: list[TokenOutput], incidents: list[Incident]) -> None:
        """Journal first, then the frames: what a client has seen is on record, and in the stats that it reads next."""
        self.stats = self.core.stats()
        self.journal.append([record_of(output) for output in outputs])
        frames: defaultdict[Connection, bytearray] = defaultdict(bytearray)
        for output in outputs:
            frames[self._owners[output.sequence_id]] += encode_frame(output)
            if output.finish_reason is not None:
                del self._owners[output.sequence_id]
        if frames or incidents:
            to_all = b"".join(encode_frame(incident) for incident in incidents)
            self.deliver({connection: bytes(data) for connection, data in frames.items()}, to_all)


class Server:
    """The event loop's side."""

    def __init__(self, config: WorkerConfig, core: EngineCore, journal: Journal, ready: Ready) -> None:
        self._config = config
        self._ready = ready
        self._connections: set[Connection] = set()
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._engine = EngineThread(core, journal, config.num_failures_max, self._deliver)
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


def unobserved(num_blocks: int, block_size: int) -> Observer:
    return NullObserver()


def log(line: str) -> None:
    print(f"engine worker: {line}", file=sys.stderr, flush=True)


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


def build(config: WorkerConfig, make_observer: MakeObserver) -> tuple[EngineCore, Journal, Ready]:
    """Load everything. Raises ConfigError with one clear line."""
    if config.scheduling not in POLICIES:
        raise ConfigError(f"scheduling must be one of {', '.join(POLICIES)}, not {config.scheduling!r}")
    if not config.model_dir.is_dir():
        raise ConfigError(f"there is no model folder at {config.model_dir}")
    torch.set_num_threads(config.effective_num_threads)
    tokenizer = Tokenizer.load(config.model_dir)
    runner = ModelRunner.load(
        config.model_dir,
        dtype=config.dtype,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        num_blocks=config.num_blocks,
        kv_cache_bytes=config.kv_cache_bytes,
    )
    model = runner.model.config
    digest = model_digest(config.model_dir)
    core = EngineCore(
        runner,
        decode=tokenizer.decode,
        eos_token_ids=tokenizer.eos_token_ids,
        context_max=model.context_max,
        vocab_size=model.vocab_size,
        max_batched_tokens=config.max_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_waiting=config.max_waiting,
        observer=make_observer(runner.num_blocks, config.block_size),
        scheduling=config.scheduling,
        prefix_cache=config.prefix_cache,
        model_digest=digest,
    )
    epoch = f"{time.time_ns():020d}-{secrets.token_hex(8)}"
    ready = Ready(
        protocol_version=PROTOCOL_VERSION,
        epoch=epoch,
        pid=os.getpid(),
        model_id=tokenizer.model_id,
        model_digest=digest,
        context_max=model.context_max,
        vocab_size=model.vocab_size,
        block_size=config.block_size,
        num_blocks=runner.num_blocks,
        dtype=config.dtype,
        device="cpu",
        kernels=KERNELS,
        isolation=ISOLATION,
    )
    return core, Journal(config.journal_dir, epoch), ready


def run_worker(config: WorkerConfig, make_observer: MakeObserver = unobserved) -> int:
    """Serve until drained; returns the exit code. Blocks; call it in the main thread of a process of its own.

    ``make_observer`` is called with the number of blocks and their size, once both are known.
    """
    try:
        clear_socket(config.socket_path)
        core, journal, ready = build(config, make_observer)
        return asyncio.run(_serve(config, core, journal, ready))
    except (ConfigError, OSError) as error:
        log(str(error))
        return 2


async def _serve(config: WorkerConfig, core: EngineCore, journal: Journal, ready: Ready) -> int:
    return await Server(config, core, journal, ready).serve()
