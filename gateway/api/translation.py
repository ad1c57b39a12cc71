"""From the wire's words to the engine's: messages to token ids, OpenAI's parameters to SamplingParams.

The engine never sees a tenant, a model name or a message; it gets token ids, a domain and a salt.
"""

import asyncio
import dataclasses
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from engine.errors import TokenizerError
from engine.protocol import Ready, SamplingParams, Submit
from engine.tokenizer import Tokenizer
from gateway.api import wire
from gateway.api.problems import InvalidRequestError, ModelNotFoundError
from gateway.secrets import Secrets, cache_salt
from gateway.settings import Settings

INLINE_CHARS_MAX = 8_192  # longer texts are tokenized in a thread: the event loop serves everybody
SEED_MASK = 2**63 - 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Work:
    """What one request asks of the engine, with every default filled in."""

    model: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stream: bool
    include_usage: bool
    cache_salt: str  # the client's own, "" for none

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    def at_most(self, max_tokens: int) -> "Work":
        """The same work, cut with finish_reason `length` after `max_tokens` at the latest."""
        if max_tokens >= self.sampling.max_tokens:
            return self
        return dataclasses.replace(self, sampling=msgspec.structs.replace(self.sampling, max_tokens=max_tokens))


@dataclass(frozen=True, slots=True)
class Translator:
    """Turns parsed requests into Work. Raises InvalidRequestError or ModelNotFoundError."""

    tokenizer: Tokenizer
    settings: Settings
    entropy: Callable[[int], bytes]

    async def chat(self, request: wire.ChatRequest, ready: Ready) -> Work:
        self._check_model(request.model)
        messages = [
            {"role": "system" if message.role == "developer" else message.role, "content": wire.content_text(message)}
            for message in request.messages
        ]
        num_chars = sum(len(message["content"]) for message in messages)
        try:
            token_ids = await _off_loop(num_chars, lambda: self.tokenizer.encode_chat(messages))
        except TokenizerError as error:
            raise InvalidRequestError("the model's chat template refused these messages", "messages") from error
        named = "max_completion_tokens" if request.max_completion_tokens is not None else "max_tokens"
        return self._work(request, token_ids, request.max_new_tokens, named, "messages", ready)

    async def completion(self, request: wire.CompletionRequest, ready: Ready) -> Work:
        self._check_model(request.model)
        prompt = wire.prompt_of(request)
        if isinstance(prompt, str):
            token_ids = await _off_loop(len(prompt), lambda: self.tokenizer.encode(prompt))
        else:
            token_ids = prompt
            for index, token_id in enumerate(token_ids):
                if not 0 <= token_id < ready.vocab_size:
                    last = ready.vocab_size - 1
                    raise InvalidRequestError(f"prompt[{index}] is {token_id}, outside 0..{last}", "prompt")
        return self._work(request, token_ids, request.max_tokens, "max_tokens", "prompt", ready)

    def _check_model(self, model: str) -> None:
        if model != self.tokenizer.model_id:
            raise ModelNotFoundError(model)

    def _work(
        self, request: wire.Common, token_ids: list[int], asked: int | None, asked_in: str, prompt_in: str, ready: Ready
    ) -> Work:
        max_tokens = _room(
            len(token_ids), asked, asked_in, prompt_in, ready.context_max, self.settings.max_tokens_default
        )
        seed = request.seed if request.seed is not None else int.from_bytes(self.entropy(8), "big")
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if request.temperature is None else float(request.temperature),
            top_p=1.0 if request.top_p is None else float(request.top_p),
            seed=seed & SEED_MASK,
            stop=request.stop_texts,
        )
        return Work(
            model=request.model,
            prompt_token_ids=token_ids,
            sampling=sampling,
            stream=bool(request.stream),
            include_usage=request.include_usage,
            cache_salt=request.cache_salt or "",
        )


def _room(num_prompt: int, asked: int | None, asked_in: str, prompt_in: str, context_max: int, default: int) -> int:
    """How many tokens may be generated; refuses what cannot fit into the context, naming the field at fault."""
    if num_prompt == 0:
        raise InvalidRequestError(f"{prompt_in} holds no token", prompt_in)
    room = context_max - num_prompt
    if room < 1:
        raise InvalidRequestError(
            f"{prompt_in} has {num_prompt} tokens; the context holds {context_max} with at least one for the answer",
            prompt_in,
            "context_length_exceeded",
        )
    if asked is None:
        return min(default, room)
    if asked > room:
        raise InvalidRequestError(
            f"{asked_in} is {asked}, but {prompt_in} has {num_prompt} tokens and the context holds {context_max}",
            asked_in,
            "context_length_exceeded",
        )
    return asked


def submit_of(work: Work, *, sequence_id: str, tenant_id: str, secrets: Secrets) -> Submit:
    """The engine's view: the tenant is only a domain and a salt. A client's own salt subdivides its tenant's."""
    salt = cache_salt(secrets, tenant_id)
    if work.cache_salt:
        salt = hmac.new(salt, b"bulkhead/client-salt/v1\0" + work.cache_salt.encode(), hashlib.sha256).digest()
    return Submit(
        sequence_id=sequence_id,
        domain=tenant_id,
        cache_salt=salt,
        prompt_token_ids=work.prompt_token_ids,
        sampling=work.sampling,
    )


async def _off_loop(num_chars: int, encode: Callable[[], T]) -> T:
    return encode() if num_chars <= INLINE_CHARS_MAX else await asyncio.to_thread(encode)
