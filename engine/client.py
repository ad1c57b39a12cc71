"""The gateway's end of the socket: submit sequences, iterate their output, learn when the worker is gone.

One reader task takes frames apart and hands each to its Generation. A slow consumer never blocks the others: its
deltas are merged into one pending TokenOutput, which max_tokens bounds anyway. No torch here.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from msgspec.structs import replace

from engine.endings import withheld
from engine.errors import EngineConnectError, EngineGoneError, ProtocolError
from engine.protocol import (
    PROTOCOL_VERSION,
    Abort,
    Drain,
    Erase,
    Erased,
    FrameReader,
    FromWorker,
    Incident,
    Ready,
    Stats,
    Submit,
    TokenOutput,
    ToWorker,
    decode_from_worker,
    encode_frame,
)

READ_BYTES = 256 * 1024
CONNECT_RETRY_S = 0.05
CROSSED = "crossed_output"  # the kind of an Incident


class Generation(AsyncIterator[TokenOutput]):
    """One sequence's output. The last TokenOutput has a finish_reason; the iteration ends after it."""

    def __init__(self, submit: Submit) -> None:
        self.sequence_id = submit.sequence_id
        self.domain = submit.domain
        self.nonce = submit.nonce
        self.num_prompt_tokens = 0  # of the last frame received, consumed or not
        self.num_completion_tokens = 0
        self._pending: TokenOutput | None = None
        self._arrived = asyncio.Event()
        self._gone = False
        self._ended = False

    @property
    def finished(self) -> bool:
        """True once the last frame has been consumed, or the worker's loss has been raised."""
        return self._ended

    def put(self, output: TokenOutput) -> None:
        self.num_prompt_tokens = output.num_prompt_tokens
        self.num_completion_tokens = output.num_completion_tokens
        self._pending = output if self._pending is None else merge(self._pending, output)
        self._arrived.set()

    def worker_gone(self) -> None:
        self._gone = True
        self._arrived.set()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> TokenOutput:
        """Raises EngineGoneError when the worker's connection ends before the last frame."""
        if self._ended:
            raise StopAsyncIteration
        await self._arrived.wait()
        if self._pending is None:
            self._ended = True
            raise EngineGoneError(self.num_prompt_tokens, self.num_completion_tokens)
        output, self._pending = self._pending, None
        self._ended = output.finish_reason is not None
        if not self._gone:
            self._arrived.clear()
        return output


def merge(first: TokenOutput, second: TokenOutput) -> TokenOutput:
    """Two deltas of one sequence as one: texts and tokens joined, counts and ending of the later."""
    return TokenOutput(
        sequence_id=second.sequence_id,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        num_prompt_tokens=second.num_prompt_tokens,
        num_cached_tokens=second.num_cached_tokens,
        num_completion_tokens=second.num_completion_tokens,
        finish_reason=second.finish_reason,
        error=second.error,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        effort=second.effort,
    )


class EngineClient:
    """Build with `connect`. `closed` is set when the connection has ended, for whatever reason."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ready: Ready,
        frames: FrameReader,
        on_incident: Callable[[Incident], None] | None,
    ) -> None:
        self.ready = ready
        self.stats: Stats | None = None
        self.closed = asyncio.Event()
        self._reader = reader
        self._writer = writer
        self._frames = frames
        self._on_incident = on_incident
        self._generations: dict[str, Generation] = {}
        self._erasing: dict[str, asyncio.Future[int]] = {}
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls, path: Path | str, *, on_incident: Callable[[Incident], None] | None = None, timeout_s: float
    ) -> "EngineClient":
        """Connect and read the Ready frame, retrying until ``timeout_s`` while no worker listens.

        Raises EngineConnectError. ``on_incident`` is called from the event loop for each Incident and must not block.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await cls._connect(str(path), on_incident)
        except TimeoutError as error:
            raise EngineConnectError(f"no engine worker answered on {path} within {timeout_s} s") from error
        except ProtocolError as error:
            raise EngineConnectError(f"{path}: {error}") from error

    @classmethod
    async def _connect(cls, path: str, on_incident: Callable[[Incident], None] | None) -> "EngineClient":
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(path, limit=READ_BYTES)
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(CONNECT_RETRY_S)
                continue
            try:
                client = await cls._handshake(reader, writer, on_incident)
            except BaseException:
                writer.close()
                raise
            if client is not None:
                return client
            writer.close()
            await asyncio.sleep(CONNECT_RETRY_S)

    @classmethod
    async def _handshake(
        cls,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_incident: Callable[[Incident], None] | None,
    ) -> "EngineClient | None":
        frames = FrameReader()
        messages: list[FromWorker] = []
        while not messages:
            try:
                data = await reader.read(READ_BYTES)
            except ConnectionError:
                data = b""
            if not data:
                return None  # the worker closed before it spoke: it is going down, try again
            messages.extend(decode_from_worker(body) for body in frames.feed(data))
        ready = messages[0]
        if not isinstance(ready, Ready) or ready.protocol_version != PROTOCOL_VERSION:
            raise ProtocolError(f"the worker does not speak protocol version {PROTOCOL_VERSION}")
        client = cls(reader, writer, ready, frames, on_incident)
        for message in messages[1:]:
            client._receive(message)
        client._task = asyncio.create_task(client._read_loop(), name="engine-client-reader")
        return client

    async def submit(self, submit: Submit) -> Generation:
        """Send a sequence to the worker. Raises EngineGoneError (counts 0) if the connection has ended already, and
        ValueError if the id is in use on this connection."""
        if self.closed.is_set():
            raise EngineGoneError(0, 0)
        if submit.sequence_id in self._generations:
            raise ValueError(f"sequence id {submit.sequence_id!r} is in use")
        generation = Generation(submit)
        frame = encode_frame(submit)
        self._generations[submit.sequence_id] = generation
        self._writer.write(frame)
        try:
            await self._writer.drain()
        except ConnectionError:
            pass  # the reader task notices and ends every generation
        except asyncio.CancelledError:
            self.abort(submit.sequence_id)
            raise
        return generation

    def abort(self, sequence_id: str) -> None:
        """Ask the worker to stop a sequence. Its Generation still ends with a last TokenOutput (exact counts)."""
        self._send(Abort(sequence_id))

    def drain(self, timeout_ms: int) -> None:
        """Ask the worker to finish what runs within ``timeout_ms`` and exit."""
        self._send(Drain(timeout_ms))

    async def erase(self, domain: str) -> int:
        """Ask the worker to end a domain's sequences and to zero its blocks; how many there were. Raises
        EngineGoneError."""
        if self.closed.is_set():
            raise EngineGoneError(0, 0)
        if domain not in self._erasing:
            self._erasing[domain] = asyncio.get_running_loop().create_future()
            self._send(Erase(domain))
        return await asyncio.shield(self._erasing[domain])

    async def close(self) -> None:
        """Close the connection; the worker aborts whatever is still running on it."""
        self._writer.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._end()

    def _send(self, message: ToWorker) -> None:
        if not self.closed.is_set() and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def _read_loop(self) -> None:
        try:
            while data := await self._reader.read(READ_BYTES):
                for body in self._frames.feed(data):
                    self._receive(decode_from_worker(body))
        except (ConnectionError, ProtocolError):
            pass  # both mean the same to the caller: this worker is lost
        finally:
            self._end()

    def _receive(self, message: FromWorker) -> None:
        match message:
            case TokenOutput():
                generation = self._generations.get(message.sequence_id)
                if generation is not None:
                    if message.nonce != generation.nonce:
                        message = self._crossed(generation, message)
                    generation.put(message)
                    if message.finish_reason is not None:
                        del self._generations[message.sequence_id]
            case Stats():
                self.stats = message
            case Incident():
                if self._on_incident is not None:
                    self._on_incident(message)
            case Erased(domain, num_blocks):
                erasing = self._erasing.pop(domain, None)
                if erasing is not None:
                    erasing.set_result(num_blocks)
            case Ready():
                raise ProtocolError("a second Ready frame")

    def _crossed(self, generation: Generation, output: TokenOutput) -> TokenOutput:
        """Its content is somebody else's: nothing of it is passed on, the sequence ends, and the incident is told."""
        if self._on_incident is not None:
            detail = "an output carried another sequence's nonce"
            names, domains = [generation.sequence_id], [generation.domain]
            self._on_incident(Incident(CROSSED, self.stats.step if self.stats else 0, names, domains, -1, detail))
        self.abort(generation.sequence_id)
        return withheld(
            replace(
                output,
                num_prompt_tokens=generation.num_prompt_tokens,
                num_cached_tokens=0,
                num_completion_tokens=generation.num_completion_tokens,
            )
        )

    def _end(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self._writer.close()
            for generation in self._generations.values():
                generation.worker_gone()
            self._generations.clear()
            for erasing in self._erasing.values():
                erasing.set_exception(EngineGoneError(0, 0))
                erasing.exception()  # whoever waits hears of it; nobody has to
            self._erasing.clear()
