"""A worker without a model: the engine's real protocol on a real unix socket, tokens by arithmetic.

What it would answer is a pure function (`IntegerModel.answer`), so a test knows every byte beforehand; what it did
answer is in `counts`, the truth that bills are compared with. Faults are asked for beforehand: a `Script` says how one
sequence behaves.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from engine.protocol import (
    PROTOCOL_VERSION,
    Abort,
    Effort,
    Erase,
    Erased,
    FrameReader,
    FromWorker,
    Ready,
    Stats,
    Submit,
    TokenLogprob,
    TokenOutput,
    decode_to_worker,
    encode_frame,
)

EOS = 0
VOCAB_SIZE = 258


@dataclass(frozen=True)
class IntegerModel:
    """Token k of an answer depends on the prompt, the seed and k; about one in `eos_every` ends it."""

    eos_every: int = 23

    def token(self, prompt: list[int], seed: int, position: int) -> int:
        mixed = (
            sum((i + 1) * t for i, t in enumerate(prompt)) * 31 + seed * 17 + position * position * 7 + 3
        ) % 1_000_003
        return EOS if mixed % self.eos_every == 0 else 1 + mixed % (VOCAB_SIZE - 2)

    def answer(self, prompt: list[int], seed: int, max_tokens: int) -> tuple[list[int], str]:
        """All token ids (a final EOS is counted but has no text) and the finish reason."""
        tokens: list[int] = []
        while len(tokens) < max_tokens:
            tokens.append(self.token(prompt, seed, len(tokens)))
            if tokens[-1] == EOS:
                return tokens, "stop"
        return tokens, "length"


def text_of(token: int) -> str:
    return "" if token == EOS else f"t{token} "


def logprob_of(token: int, offset: int, num_top: int) -> TokenLogprob:
    """Pretended, and told apart by token and place."""
    own = -(token % 8) / 8
    return TokenLogprob(token, own, ((token, own), (1, -9.0), (2, -10.0))[:num_top], offset)


def prompt_logprobs_of(prompt: list[int], num_top: int) -> list[TokenLogprob]:
    return [replace(logprob_of(token, 0, num_top), rank=1 + token % 3) for token in prompt[1:]]


@dataclass(frozen=True)
class Script:
    """How the next sequence goes wrong, if at all."""

    die_after: int | None = None  # drop every connection after this many tokens
    error_after: tuple[int, str] | None = None  # end with this error code after this many tokens
    hang_after: int | None = None  # produce nothing more, but answer an abort
    deaf: bool = False  # do not even answer an abort
    withhold: int = 0  # send text only with every so many tokens, as stop strings make the engine do
    delay_s: float = 0.0  # between tokens
    crossed_after: int | None = None  # after this many tokens its outputs carry another sequence's nonce


@dataclass
class Counts:
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int = 0
    finish_reason: str | None = None
    domain: str = ""
    cache_salt: bytes = b""


def pretended(counts: Counts) -> Effort:
    num_prefill = counts.num_prompt_tokens - counts.num_cached_tokens
    num_decode = max(0, counts.num_completion_tokens - 1)
    return Effort(100 * num_prefill + 7 * num_decode, 11 * counts.num_completion_tokens, num_prefill, 2, num_decode)


@dataclass
class IntegerWorker:
    path: Path
    model: IntegerModel = field(default_factory=IntegerModel)
    context_max: int = 256
    num_cached_tokens: int = 0  # pretended prefix hits of every prompt that is longer
    scripts: list[Script] = field(default_factory=list)  # taken from the front, one a sequence
    counts: dict[str, Counts] = field(default_factory=dict)
    submits: list[Submit] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    erased: list[str] = field(default_factory=list)
    num_erased: int = 3  # blocks, pretended
    measures: bool = True  # what each sequence takes, pretended
    on_token: Callable[[str, int], None] | None = None

    def __post_init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._aborts: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._handlers: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self.drop()
            await asyncio.gather(*self._handlers, *self._tasks.values(), return_exceptions=True)
            await self._server.wait_closed()
            self._server = None

    def drop(self) -> None:
        """Every connection ends without a word, as when the process is killed."""
        for task in self._tasks.values():
            task.cancel()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self._writers.add(writer)
        frames = FrameReader()
        self._send(writer, self._ready())
        self._send(writer, Stats(0, 0, 0, 64, 64, {}, 0, 0, 0, {}))
        try:
            while data := await reader.read(65536):
                for body in frames.feed(data):
                    message = decode_to_worker(body)
                    if isinstance(message, Submit):
                        self._begin(message, writer)
                    elif isinstance(message, Erase):
                        self.erased.append(message.domain)
                        self._send(writer, Erased(message.domain, self.num_erased))
                    elif isinstance(message, Abort):
                        self._aborts[message.sequence_id].set()
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            self._handlers.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    def _begin(self, submit: Submit, writer: asyncio.StreamWriter) -> None:
        script = self.scripts.pop(0) if self.scripts else Script()
        self.submits.append(submit)
        num_prompt = len(submit.prompt_token_ids)
        counts = Counts(num_prompt, min(self.num_cached_tokens, num_prompt - 1))
        counts.domain, counts.cache_salt = submit.domain, submit.cache_salt
        self.counts[submit.sequence_id] = counts
        self._tasks[submit.sequence_id] = asyncio.create_task(self._generate(submit, script, counts, writer))

    async def _generate(self, submit: Submit, script: Script, counts: Counts, writer: asyncio.StreamWriter) -> None:
        tokens, reason = self.model.answer(submit.prompt_token_ids, submit.sampling.seed, submit.sampling.max_tokens)
        aborted = self._aborts[submit.sequence_id]
        withheld, offset, told = "", 0, []
        owed = prompt_logprobs_of(submit.prompt_token_ids, submit.sampling.prompt_logprobs)
        if submit.sampling.prompt_logprobs >= 0 and len(owed) > 1:  # as a long prompt's come: in parts
            part = self._output(submit, counts, "", (), None)
            self._send(writer, replace(part, prompt_logprobs=tuple(owed[:1])))
            owed = owed[1:]
        for index, token in enumerate(tokens):
            if script.delay_s:
                with suppress(TimeoutError):
                    await asyncio.wait_for(aborted.wait(), script.delay_s)
            else:
                await asyncio.sleep(0)
            if script.error_after is not None and index >= script.error_after[0]:
                self._end(writer, submit, counts, "error", script.error_after[1])
                return
            if script.die_after is not None and index >= script.die_after:
                asyncio.get_running_loop().call_soon(self.drop)
                return
            if script.hang_after is not None and index >= script.hang_after:
                await aborted.wait()
            if aborted.is_set():
                self.aborted.append(submit.sequence_id)
                if not script.deaf:
                    self._end(writer, submit, counts, "abort", "")
                return
            if script.crossed_after is not None and index >= script.crossed_after:
                submit = replace(submit, nonce=submit.nonce ^ 1)
            counts.num_completion_tokens += 1
            last = index == len(tokens) - 1
            withheld += text_of(token)
            if submit.sampling.logprobs >= 0 and token != EOS:
                told.append(logprob_of(token, offset, submit.sampling.logprobs))
            offset += len(text_of(token))
            hold_back = script.withhold and (index + 1) % script.withhold and not last
            text = "" if hold_back else withheld
            logprobs = () if hold_back else tuple(told)
            if not hold_back:
                withheld, told = "", []
            if last:
                counts.finish_reason = reason
            output = self._output(submit, counts, text, (token,), reason if last else None)
            if submit.sampling.prompt_logprobs >= 0:
                output, owed = replace(output, prompt_logprobs=tuple(owed)), []
            self._send(writer, replace(output, logprobs=logprobs))
            if self.on_token is not None:
                self.on_token(submit.sequence_id, counts.num_completion_tokens)

    def _end(self, writer: asyncio.StreamWriter, submit: Submit, counts: Counts, reason: str, error: str) -> None:
        counts.finish_reason = reason
        output = self._output(submit, counts, "", (), reason)
        self._send(writer, replace(output, error=error))

    def _output(
        self, submit: Submit, counts: Counts, text: str, ids: tuple[int, ...], reason: str | None
    ) -> TokenOutput:
        return TokenOutput(
            submit.sequence_id,
            text,
            ids,
            counts.num_prompt_tokens,
            counts.num_cached_tokens,
            counts.num_completion_tokens,
            reason,
            nonce=submit.nonce,
            effort=pretended(counts) if self.measures else None,
        )

    def _ready(self) -> Ready:
        return Ready(
            protocol_version=PROTOCOL_VERSION,
            epoch="epoch-1",
            pid=1,
            model_id="integer",
            model_digest="0" * 64,
            context_max=self.context_max,
            vocab_size=VOCAB_SIZE,
            block_size=16,
            num_blocks=64,
            dtype="int",
            device="none",
            kernels="arithmetic",
            isolation="relaxed",
        )

    def _send(self, writer: asyncio.StreamWriter, message: FromWorker) -> None:
        if not writer.is_closing():
            writer.write(encode_frame(message))
