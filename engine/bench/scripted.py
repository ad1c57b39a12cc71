"""A worker without a model: the engine's protocol and journal, answers by a script. For measuring what is around it.

    python -m engine.bench.scripted --config JSON

An answer's length is a function of the prompt and the seed, between `answer_tokens_min` and `answer_tokens_max` (less
where max_tokens cuts it), and its tokens come `tokens_per_step` at a time, every `step_ms`. All sequences go on in the
same step, as in the engine: one journal write, then the frames. So what it counts is as true as the engine's own.

With `counts_dir` the journal has a second name there, which nobody prunes: the truth that bills are compared with.
"""

import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.journal import Journal, record_of
from engine.protocol import (
    PROTOCOL_VERSION,
    Abort,
    Drain,
    Erase,
    Erased,
    FrameReader,
    FromWorker,
    Ready,
    Stats,
    Submit,
    TokenOutput,
    decode_to_worker,
    encode_frame,
)

READ_BYTES = 256 * 1024
STATS_INTERVAL_S = 1.0
TOKEN = 66  # a letter in a byte-level vocabulary
TEXT = "a"


class ScriptedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    socket_path: str
    journal_dir: str
    counts_dir: str = ""
    model_id: str = "scripted"
    step_ms: int = 20  # 0: a step whenever something runs
    tokens_per_step: int = 1
    answer_tokens_min: int = 1
    answer_tokens_max: int = 1_000_000  # more than any max_tokens: every answer is cut


@dataclass(slots=True)
class Running:
    submit: Submit
    writer: asyncio.StreamWriter
    num_left: int  # tokens of the answer
    reason: str  # how it will end
    num_completion_tokens: int = 0


@dataclass
class ScriptedWorker:
    config: ScriptedConfig
    epoch: str
    running: dict[str, Running] = field(default_factory=dict)
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    def __post_init__(self) -> None:
        Path(self.config.socket_path).unlink(missing_ok=True)
        self._journal = Journal(Path(self.config.journal_dir), self.epoch)
        if self.config.counts_dir:
            counts = Path(self.config.counts_dir)
            counts.mkdir(parents=True, exist_ok=True)
            os.link(self._journal.path, counts / self._journal.path.name)
        self._writers: set[asyncio.StreamWriter] = set()
        self._work = asyncio.Event()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        server = await asyncio.start_unix_server(self._connected, self.config.socket_path)
        tasks = [asyncio.create_task(self._steps()), asyncio.create_task(self._tell_stats())]
        await self._stop.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._journal.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        _send(writer, self._ready())
        frames = FrameReader()
        try:
            while data := await reader.read(READ_BYTES):
                for body in frames.feed(data):
                    self._receive(decode_to_worker(body), writer)
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            self.running = {name: one for name, one in self.running.items() if one.writer is not writer}
            writer.close()

    def _receive(self, message: Submit | Abort | Drain | Erase, writer: asyncio.StreamWriter) -> None:
        match message:
            case Submit():
                length = self._length(message)
                num_tokens = min(length, message.sampling.max_tokens)
                reason = "stop" if length <= message.sampling.max_tokens else "length"
                self.running[message.sequence_id] = Running(message, writer, num_tokens, reason)
                self.num_prompt_tokens += len(message.prompt_token_ids)
                self._work.set()
            case Abort():
                one = self.running.pop(message.sequence_id, None)
                if one is not None:
                    self._emit([(one, self._output(one, 0, "abort"))])
            case Erase():
                _send(writer, Erased(message.domain, 0))  # nothing of anybody is kept here
            case Drain():
                self._stop.set()

    def _length(self, submit: Submit) -> int:
        config = self.config
        spread = config.answer_tokens_max - config.answer_tokens_min + 1
        mixed = (sum(submit.prompt_token_ids) * 31 + submit.sampling.seed * 1_000_003) % 2**61
        return config.answer_tokens_min + mixed * 2_654_435_761 % 2**32 * spread // 2**32

    async def _steps(self) -> None:
        while True:
            await self._work.wait()
            if self.config.step_ms:
                await asyncio.sleep(self.config.step_ms / 1_000)
            self._step()
            if not self.running:
                self._work.clear()
            await asyncio.sleep(0)

    def _step(self) -> None:
        self.num_steps += 1
        outputs = []
        for name, one in list(self.running.items()):
            num_tokens = min(one.num_left, self.config.tokens_per_step)
            one.num_left -= num_tokens
            one.num_completion_tokens += num_tokens
            self.num_completion_tokens += num_tokens
            outputs.append((one, self._output(one, num_tokens, one.reason if one.num_left == 0 else None)))
            if one.num_left == 0:
                del self.running[name]
        self._emit(outputs)

    def _emit(self, outputs: list[tuple[Running, TokenOutput]]) -> None:
        """The journal first: what a client has seen is in it."""
        self._journal.append([record_of(output) for _, output in outputs])
        for one, output in outputs:
            _send(one.writer, output)

    def _output(self, one: Running, num_tokens: int, reason: str | None) -> TokenOutput:
        return TokenOutput(
            one.submit.sequence_id,
            TEXT * num_tokens,
            (TOKEN,) * num_tokens,
            len(one.submit.prompt_token_ids),
            0,
            one.num_completion_tokens,
            reason,
            nonce=one.submit.nonce,
        )

    async def _tell_stats(self) -> None:
        while True:
            stats = Stats(
                self.num_steps,
                len(self.running),
                0,
                1,
                1,
                {},
                self.num_prompt_tokens,
                self.num_completion_tokens,
                0,
                dict.fromkeys(
                    ("num_steps", "num_slots_checked", "num_violations", "num_self_tests", "num_self_tests_failed"), 0
                ),
            )
            for writer in self._writers:
                _send(writer, stats)
            await asyncio.sleep(STATS_INTERVAL_S)

    def _ready(self) -> Ready:
        return Ready(
            protocol_version=PROTOCOL_VERSION,
            epoch=self.epoch,
            pid=os.getpid(),
            model_id=self.config.model_id,
            model_digest="0" * 64,
            context_max=1_000_000,
            vocab_size=258,
            block_size=1,
            num_blocks=1,
            dtype="none",
            device="none",
            kernels="scripted",
            isolation="relaxed",
        )


def _send(writer: asyncio.StreamWriter, message: FromWorker) -> None:
    if not writer.is_closing():
        writer.write(encode_frame(message))


def main() -> None:
    config = msgspec.json.decode(sys.argv[sys.argv.index("--config") + 1], type=ScriptedConfig)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(ScriptedWorker(config, f"scripted-{os.urandom(8).hex()}").run())


if __name__ == "__main__":
    main()
